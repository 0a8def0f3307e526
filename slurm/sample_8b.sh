#!/usr/bin/env bash
# sbatch slurm/sample_8b.sh [section.key=value ...]
#
# Samples responses to the prompts of recipes/llama3_8b.yaml and ranks them, which makes on-policy pairs. Uses one GPU and
# the engine sample.engine. After any interruption the job resumes with the unanswered prompts.
#SBATCH --job-name=sample_8b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
RECIPE="${RECIPE:-llama3_8b}"
# shellcheck source=slurm/common.sh
source "${TREG:-$SLURM_SUBMIT_DIR}/slurm/common.sh"
record "$@"
samples=$(setting sample.output "$@")
run=$(setting run "$@")
launch "$samples" "$PYTHON" "$TREG/tools/sample_responses.py" --recipe "$RECIPE" "$@"
launch "$run" "$PYTHON" "$TREG/tools/rank_responses.py" --recipe "$RECIPE" "$@"
