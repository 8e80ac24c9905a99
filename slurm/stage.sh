# Sourced by the wrappers, which run from the repository's root: one stage under Slurm.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

# Run a stage. When Slurm announces the time limit (--signal), stop it and requeue the job: every file is whole at any
# moment, so the same command goes on where it was.
run_stage() {
    local script="$1" cores="${SLURM_CPUS_PER_TASK:-1}" gpus="${SLURM_GPUS_ON_NODE:-1}" command=(.venv/bin/python)
    local options=() option
    shift
    case "$script" in
        03_* | 05_*) # one process for each GPU
            if [ "$gpus" -gt 1 ]; then
                command=(.venv/bin/torchrun --standalone --nproc-per-node "$gpus" --)
                cores=$((cores > gpus ? cores / gpus : 1))
            fi ;;
        04_* | 07_*) ;;
        *) cores=1 ;; # these stages start a process for each core themselves
    esac
    export OMP_NUM_THREADS="$cores"
    for option in "$@"; do # a job that goes on does not start over
        [ "$option" = --fresh ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || options+=("$option")
    done
    stage=
    trap requeue USR1
    "${command[@]}" "$script" "${options[@]}" &
    stage=$!
    wait "$stage"
}

requeue() {
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MOST_RESTARTS:-50}" ]; then
        echo "time limit ahead: requeued $SLURM_RESTART_COUNT times already; is one epoch or scan longer than the limit?" >&2
        exit 1
    fi
    echo "time limit ahead: job $SLURM_JOB_ID is requeued"
    [ -z "$stage" ] || { kill -TERM "$stage" && wait "$stage"; } 2> /dev/null || true
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # Slurm ends this run of the job meanwhile
}
