# shellcheck shell=bash
# Functions shared by the job scripts. A script sets RECIPE, sources this file, and calls `train` or `launch`.
#
# From the environment, all optional:
#   RECIPE          another recipe                        PYTHON        interpreter on the nodes (site.sh)
#   TREG            this repository (where you submitted) SITE          site file (slurm/site.sh)
#   NODES           number of the job's nodes to use      RANKS         ranks per node (one per GPU)
#   CHECKS          before training ("recipe nodes")      GPU_MEMORY    of one GPU, for the recipe's check (80GB)
#   CHAIN=N         submit up to N successor jobs, one after another, in case the job is killed at its time limit
#   RETRIES         consecutive failures without progress after which the job gives up (3)
set -euo pipefail

export TREG="${TREG:-$SLURM_SUBMIT_DIR}"
SITE="${SITE:-$TREG/slurm/site.sh}"
# shellcheck source=slurm/site.example.sh
if [[ -f $SITE ]]; then source "$SITE"; fi

PYTHON="${PYTHON:-python}"
NODES="${NODES:-$SLURM_JOB_NUM_NODES}"
RANKS="${RANKS:-${SLURM_NTASKS_PER_NODE:-1}}"
CHECKS="${CHECKS-recipe nodes}"
LOG_NAME="$SLURM_SUBMIT_DIR/$SLURM_JOB_NAME-$SLURM_JOB_ID"
export PYTHONPATH="$TREG${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"   # since Slurm 22.05 srun does not take it from the job
export CUDA_DEVICE_MAX_CONNECTIONS=1                    # Megatron's tensor parallelism overlaps by it

MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
# use another port after each restart: dying processes may still hold the last one
MASTER_PORT="${MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 10000))}"
export MASTER_ADDR MASTER_PORT

CONTAINER=()
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    CONTAINER=(--container-image="$CONTAINER_IMAGE" --container-mounts="${CONTAINER_MOUNTS:-$TREG,$SLURM_SUBMIT_DIR}"
               --container-workdir="$SLURM_SUBMIT_DIR" --no-container-mount-home)
fi

# Slurm sends SIGTERM when it ends the job (preempted, cancelled, requeued, out of time); the job must not restart then.
ENDING=""
trap 'ENDING=yes' TERM

say() { echo "[$(date '+%F %T')] $*"; }

# Run a command with one task per rank.
ranks() {
    srun --nodes="$NODES" --ntasks="$((NODES * RANKS))" --ntasks-per-node="$RANKS" --kill-on-bad-exit=1 \
        "${CONTAINER[@]}" "$@"
}

# Run a command with one task, on the first node.
once() { srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${CONTAINER[@]}" "$@"; }

# setting KEY [OVERRIDE ...]: print a value of the recipe.
setting() { once "$PYTHON" "$TREG/tools/show_recipe.py" --recipe "$RECIPE" --key "$@"; }

# record [OVERRIDE ...]: write commit, packages and resolved recipe beside the job's log.
record() {
    { git -C "$TREG" rev-parse HEAD && git -C "$TREG" status --short; } >"$LOG_NAME.commit" 2>&1 || true
    once "$PYTHON" -m pip freeze >"$LOG_NAME.packages" || true
    once "$PYTHON" "$TREG/tools/show_recipe.py" --recipe "$RECIPE" "$@" >"$LOG_NAME.recipe.yaml"
}

# launch FOLDER COMMAND ...: run COMMAND on all ranks until it succeeds; new files in FOLDER count as progress.
launch() {
    local folder=$1 before code failures=0
    shift
    while true; do
        before=$(finished_in "$folder")
        code=0
        ranks "$@" || code=$?
        if [[ $code == 0 ]]; then return 0; fi
        if [[ -n $ENDING ]]; then say "Slurm ended the job (exit code $code)"; exit "$code"; fi
        case $code in
            2)
                say "not restarted: fix the error above first"
                if [[ -n $SUCCESSOR ]]; then scancel "$SUCCESSOR"; fi
                exit 2 ;;
            85 | 138) requeue ;;    # stopped by SIGUSR1: 85 by training, 138 by a step that needs no time to save
        esac
        if [[ $before != "$(finished_in "$folder")" ]]; then failures=0; fi
        failures=$((failures + 1))
        if ((failures > ${RETRIES:-3})); then
            say "failed $failures times without progress (exit code $code)"
            exit "$code"
        fi
        say "ended with exit code $code; restarting (consecutive failure $failures of ${RETRIES:-3})"
        MASTER_PORT=$((MASTER_PORT + 1))
    done
}

# List checkpoints and shards, of which a launch that makes progress adds some.
finished_in() {
    find "$1" -maxdepth 3 \( -name treg.json -o -name '*.parquet' -o -name '*-[0-9]*.jsonl' \) 2>/dev/null | sort || true
}

# Requeue this job; it resumes from what it saved.
requeue() {
    say "stopped with everything saved; requeueing"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 600 &
    wait $!     # Slurm ends the script here
    exit 85
}

# chain [ARGUMENT ...]: submit a successor that starts if this job ends unfinished.
SUCCESSOR=""
chain() {
    if ((${CHAIN:-0} < 1 || ${SLURM_RESTART_COUNT:-0} > 0)); then return 0; fi
    local script
    script=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed 's/.* Command=\([^ ]*\).*/\1/')
    SUCCESSOR=$(CHAIN=$((CHAIN - 1)) sbatch --parsable --dependency="afternotok:$SLURM_JOB_ID" \
        --kill-on-invalid-dep=yes "$script" "$@")
    say "successor: job $SUCCESSOR"
}

# train [OVERRIDE ...]: start or resume the training of RECIPE and run it to its end.
train() {
    local output
    chain "$@"
    output=$(setting train.output "$@")
    if [[ ${SLURM_RESTART_COUNT:-0} == 0 ]]; then record "$@"; fi
    if [[ $CHECKS == *recipe* && ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
        once env CUDA_VISIBLE_DEVICES= "$PYTHON" -m treg_megatron.preflight --recipe "$RECIPE" --nodes "$NODES" \
            --gpus-per-node "$RANKS" --gpu-memory "${GPU_MEMORY:-80GB}" "$@"
    fi
    if [[ $CHECKS == *nodes* ]]; then ranks "$PYTHON" -m treg_megatron.node_check --recipe "$RECIPE" "$@"; fi
    say "start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID: $((NODES * RANKS)) ranks, rank 0 at $MASTER_ADDR:$MASTER_PORT"
    launch "$output" "$PYTHON" -m treg_megatron.train --recipe "$RECIPE" "$@"
}
