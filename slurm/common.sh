# shellcheck shell=bash
# Functions shared by the job scripts. A script sets RECIPE, sources this file, and calls `train` or `launch`.
#
# From the environment, all optional:
#   RECIPE          another recipe, by name or path       PYTHON        interpreter on the nodes (site.sh)
#   TREG            this repository (where you submitted) SITE          site file (slurm/site.sh)
#   NODES           number of the job's nodes to use      RANKS         ranks per node (one per GPU)
#   CHECKS          before training ("recipe nodes")      GPU_MEMORY    of one GPU, for the recipe's check (80GB)
#   CHAIN=N         submit up to N successor jobs, one after another, in case the job is killed at its time limit
#   RETRIES         consecutive failures, or requeues, without progress after which the job gives up (3)
#   MASTER_PORT     of rank 0 (from the job's id)         SBATCH_SIGNAL USR1@SECONDS: that long before the time limit
set -euo pipefail
ARGUMENTS=("$@")        # of the script

say() { echo "[$(date '+%F %T')] $*"; }

# Names of the job's nodes: the first. Not `| head`, which ends a long list's writer by SIGPIPE.
first_node() {
    local names
    names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    echo "${names%%$'\n'*}"
}

# job_field NAME: a field of this job, as Slurm shows it.
job_field() { scontrol show job "$SLURM_JOB_ID" | sed -nE "s/^(.* )?$1=(\S*).*/\2/p"; }

export TREG="${TREG:-$SLURM_SUBMIT_DIR}"
SITE="${SITE:-$TREG/slurm/site.sh}"
unset MASTER_ADDR       # of a job that submitted this one, or of a shell
if [[ -f $SITE ]]; then
    set +eu +o pipefail     # conda's and module's hooks are not written for them
    # shellcheck source=slurm/site.example.sh
    source "$SITE"
    set -euo pipefail
fi
if [[ ! -e $RECIPE && -e $TREG/$RECIPE ]]; then RECIPE="$TREG/$RECIPE"; fi

PYTHON="${PYTHON:-python}"
NODES="${NODES:-$SLURM_JOB_NUM_NODES}"
RANKS="${RANKS:-${SLURM_NTASKS_PER_NODE:-1}}"
CHECKS="${CHECKS-recipe nodes}"
LOG_NAME="$SLURM_SUBMIT_DIR/$SLURM_JOB_NAME-$SLURM_JOB_ID"
export PYTHONPATH="$TREG${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"   # since Slurm 22.05 srun does not take it from the job
unset SLURM_EXPORT_ENV                                  # of sbatch --export=NONE; srun would drop all of this

# how long before the time limit the scripts' --signal comes, for preflight and training to compare a save with
SIGNAL_SECONDS=600
if [[ ${SBATCH_SIGNAL:-} == *@* ]]; then SIGNAL_SECONDS="${SBATCH_SIGNAL##*@}"; fi
export SIGNAL_SECONDS

MASTER_ADDR="${MASTER_ADDR:-$(first_node)}"
# use another port after each restart: dying processes may still hold the last one
MASTER_PORT="${MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0}) % 10000))}"
export MASTER_ADDR MASTER_PORT

CONTAINER=()
if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    CONTAINER=(--container-image="$CONTAINER_IMAGE" --container-mounts="${CONTAINER_MOUNTS:-$TREG,$SLURM_SUBMIT_DIR}"
               --container-workdir="$SLURM_SUBMIT_DIR" --no-container-mount-home)
    # a container with a name is kept for the job's next step, which then does not import the image again
    CONTAINER_NAME="${CONTAINER_NAME-treg-$SLURM_JOB_ID}"
    if [[ -n $CONTAINER_NAME ]]; then CONTAINER+=(--container-name="$CONTAINER_NAME"); fi
fi

# Slurm sends SIGTERM when it ends the job (preempted, cancelled, requeued, out of time); the job must not restart then.
ENDING=""
trap 'ENDING=yes' TERM

# Exit codes of a command that SIGUSR1 (--signal of the scripts) ended: 85 with everything saved, 86 before there was anything
# to save, 138 before it could listen. Wherever the script ends with one of them, `ended` requeues the job.
trap 'ended $?' EXIT

# Run a command with one task per rank. Neighbouring ranks, which form tensor-parallel groups, are on one node.
ranks() {
    srun --nodes="$NODES" --ntasks="$((NODES * RANKS))" --ntasks-per-node="$RANKS" --distribution=block \
        --kill-on-bad-exit=1 "${CONTAINER[@]}" "$@"
}

# Run a command with one task, on the first node.
once() { srun --nodes=1 --ntasks=1 --ntasks-per-node=1 "${CONTAINER[@]}" "$@"; }

# setting KEY [OVERRIDE ...]: print a value of the recipe.
setting() { once "$PYTHON" "$TREG/tools/show_recipe.py" --recipe "$RECIPE" --key "$@"; }

# record [OVERRIDE ...]: write commit, packages and resolved recipe beside the job's log.
record() {
    { git -C "$TREG" rev-parse HEAD && git -C "$TREG" status --short; } >"$LOG_NAME.commit" 2>&1 || true
    once "$PYTHON" -m pip freeze >"$LOG_NAME.packages" || [[ $? != 138 ]] || exit 138
    once "$PYTHON" "$TREG/tools/show_recipe.py" --recipe "$RECIPE" "$@" >"$LOG_NAME.recipe.yaml"
}

# launch FOLDER COMMAND ...: run COMMAND on all ranks until it succeeds; new files in FOLDER count as progress.
launch() {
    local folder=$1 before code failures=0
    shift
    FOLDER=$folder
    FINISHED_AT_START=$(finished_in "$folder")
    while true; do
        before=$(finished_in "$folder")
        code=0
        ranks "$@" || code=$?
        if [[ $code == 0 ]]; then return 0; fi
        if [[ -n $ENDING ]]; then say "Slurm ended the job (exit code $code)"; exit "$code"; fi
        case $code in
            2) say "not restarted: fix the error above first"; exit 2 ;;
            85 | 86 | 138) exit "$code" ;;
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

# ended CODE: requeue this job if SIGUSR1 ended it; it resumes from what it saved. Counts requeues without progress in a file
# beside the log, because a job whose time limit or grace time is too short would be requeued for ever.
FOLDER="" FINISHED_AT_START=""
ended() {
    local without=0 count="$LOG_NAME.requeues" again
    if [[ -n $ENDING ]]; then return; fi
    case $1 in
        85) say "stopped by a signal, everything saved" ;;
        86 | 138) say "stopped by a signal before there was anything to save (exit code $1)" ;;
        2) if [[ -n $SUCCESSOR ]]; then scancel "$SUCCESSOR"; fi; return ;;     # it would fail in the same way
        *) return ;;
    esac
    if [[ -z $FOLDER || $FINISHED_AT_START == "$(finished_in "$FOLDER")" ]]; then
        if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ -f $count ]]; then without=$(<"$count"); fi
        without=$((without + 1))
        if ((without > ${RETRIES:-3})); then
            say "not requeued: $without times in a row without progress; is the time limit too short?"
            if [[ -n $SUCCESSOR ]]; then scancel "$SUCCESSOR"; fi
            return
        fi
    fi
    echo "$without" >"$count"
    say "requeueing"
    if scontrol requeue "$SLURM_JOB_ID"; then
        for _ in {1..600}; do   # until Slurm ends the script
            if [[ -n $ENDING ]]; then return; fi
            sleep 1
        done
    elif [[ -n $SUCCESSOR ]]; then
        say "this job may not be requeued; job $SUCCESSOR goes on"
    else
        printf -v again ' %q' "$(script_path)" "${ARGUMENTS[@]}"
        say "this job may not be requeued; submit it again to go on: sbatch$again"
    fi
}

# The path of this job's script as it was submitted; Slurm shows the arguments behind it.
script_path() {
    local command
    command=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
    if ((${#ARGUMENTS[@]})); then command="${command% "${ARGUMENTS[*]}"}"; fi
    echo "$command"
}

# Submit a successor that starts if this job ends unfinished, with the options of this job.
SUCCESSOR=""
chain() {
    if ((${CHAIN:-0} < 1)); then return 0; fi
    if ((${SLURM_RESTART_COUNT:-0} > 0)); then
        if [[ -f $LOG_NAME.successor ]]; then SUCCESSOR=$(<"$LOG_NAME.successor"); fi
        return 0
    fi
    local option value options=("--job-name=$SLURM_JOB_NAME")
    for option in partition=Partition account=Account qos=QOS time=TimeLimit constraint=Features reservation=Reservation \
        nodelist=ReqNodeList exclude=ExcNodeList licenses=Licenses mem=MinMemoryNode mem-per-cpu=MinMemoryCPU; do
        value=$(job_field "${option#*=}")
        case $value in "" | "(null)" | N/A) ;; *) options+=("--${option%=*}=$value") ;; esac
    done
    for option in ntasks-per-node cpus-per-task gpus-per-node gpus-per-task; do
        value=${option//-/_} value=SLURM_${value^^}     # the job's variable, such as SLURM_GPUS_PER_NODE
        if [[ -n ${!value:-} ]]; then options+=("--$option=${!value}"); fi
    done
    if SUCCESSOR=$(unset MASTER_PORT && CHAIN=$((CHAIN - 1)) sbatch --parsable --dependency="afternotok:$SLURM_JOB_ID" \
        --kill-on-invalid-dep=yes --nodes="$SLURM_JOB_NUM_NODES" "${options[@]}" "$(script_path)" "${ARGUMENTS[@]}"); then
        echo "$SUCCESSOR" >"$LOG_NAME.successor"
        say "successor: job $SUCCESSOR"
    else
        say "no successor: jobs cannot be submitted from ${SLURMD_NODENAME:-this node}; going on without"
        SUCCESSOR=""
    fi
}

# train [OVERRIDE ...]: start or resume the training of RECIPE and run it to its end.
train() {
    local output
    chain
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
