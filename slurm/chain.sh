#!/bin/bash
# Submit stages, each to start when the one before it has ended well.
# Usage: slurm/chain.sh "01 02 03 06" --preset paper --root /scratch/experiment
#        SBATCH="sbatch --gpus 1 --account lab" slurm/chain.sh "00 01 02 03 04 05 06" --preset paper
set -euo pipefail
cd "$(dirname "$0")/.."
stages="${1:?which stages, for example \"01 02 03 06\"}"
shift
previous=()
for stage in $stages; do
    job=$(${SBATCH:-sbatch} --parsable ${previous[@]+"${previous[@]}"} slurm/"$stage"_*.sbatch "$@")
    job="${job%%;*}" # of several clusters, without the name of its own
    echo "$stage: job $job"
    previous=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
done
