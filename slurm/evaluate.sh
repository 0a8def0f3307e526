#!/usr/bin/env bash
# sbatch slurm/evaluate.sh [section.key=value ...]
#
# Lets the exported model of recipes/llama3_8b.yaml answer the prompts of a benchmark, one copy of it per GPU; after any
# interruption the job resumes with the unanswered ones. From the environment, both optional:
#   JUDGE=yes          then judges the answers, as the recipe's section judge says, with one task
#   COMPARE="RUN ..."  then compares the run with others that were judged; report in the run's evaluate/comparison
# A model that one GPU cannot hold needs a server: evaluate.engine=server evaluate.server=http://NODE:8000/v1.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
RECIPE="${RECIPE:-llama3_8b}"
# shellcheck source=slurm/common.sh
source "${TREG:-$SLURM_SUBMIT_DIR}/slurm/common.sh"
record "$@"
output=$(setting evaluate.output "$@")
launch "$output" "$PYTHON" "$TREG/tools/generate_answers.py" --recipe "$RECIPE" "$@"
if [[ -n ${JUDGE:-} ]]; then
    output=$(setting judge.output "$@")
    NODES=1 RANKS=1 launch "$output" "$PYTHON" "$TREG/tools/judge_answers.py" --recipe "$RECIPE" "$@"
fi
if [[ -n ${COMPARE:-} ]]; then
    run=$(setting run "$@")
    read -ra others <<<"$COMPARE"
    once "$PYTHON" "$TREG/tools/compare_arms.py" "$run" "${others[@]}" --output "$run/evaluate/comparison"
fi
