#!/usr/bin/env bash
# sbatch slurm/index.sh [section.key=value ...]
#
# Converts labelled pairs to the aligned dataset that training reads. Needs no GPU.
#SBATCH --job-name=index
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
RECIPE="${RECIPE:-llama3_70b}"
# shellcheck source=slurm/common.sh
source "${TREG:-$SLURM_SUBMIT_DIR}/slurm/common.sh"
record "$@"
once "$PYTHON" "$TREG/tools/index_pairs.py" --recipe "$RECIPE" "$@"
