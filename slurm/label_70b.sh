#!/usr/bin/env bash
# sbatch slurm/label_70b.sh [section.key=value ...]
#
# Labels the pairs of recipes/llama3_70b.yaml with the 70B reference model, one replica per node of eight GPUs. More nodes
# label faster; after any interruption the job resumes with the missing shards.
#SBATCH --job-name=label_70b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
RECIPE="${RECIPE:-llama3_70b}"
# shellcheck source=slurm/common.sh
source "${TREG:-$SLURM_SUBMIT_DIR}/slurm/common.sh"
record "$@"
output=$(setting label.output "$@")
launch "$output" "$PYTHON" "$TREG/tools/label_tokens.py" --recipe "$RECIPE" "$@"
