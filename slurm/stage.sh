# Sourced by the wrappers, which run from the repository's root: one stage under Slurm.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"

# Run a stage. When Slurm announces the time limit (--signal), stop it and requeue the job: every file is whole at any
# moment, so the same command goes on where it was.
run_stage() {
    local script="$1" command=(.venv/bin/python)
    shift
    case "$script" in
        03_*|05_*) # one process for each GPU
            if [ "${SLURM_GPUS_ON_NODE:-1}" -gt 1 ]; then
                command=(.venv/bin/torchrun --standalone --nproc-per-node "$SLURM_GPUS_ON_NODE" --)
            fi ;;
    esac
    trap 'requeue "$stage"' USR1
    "${command[@]}" "$script" "$@" &
    stage=$!
    wait "$stage"
}

requeue() {
    echo "time limit ahead: job $SLURM_JOB_ID is requeued"
    kill -TERM "$1" 2> /dev/null || true
    wait "$1" || true
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # Slurm ends this run of the job meanwhile
}
