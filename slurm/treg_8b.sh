#!/usr/bin/env bash
# sbatch slurm/treg_8b.sh [section.key=value ...]
#
# Trains recipes/llama3_8b.yaml on a node of eight 80 GB GPUs. After any interruption the job resumes
# from its newest checkpoint.
#SBATCH --job-name=treg_8b
#SBATCH --nodes=1
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
RECIPE="${RECIPE:-llama3_8b}"
# shellcheck source=slurm/common.sh
source "${TREG:-$SLURM_SUBMIT_DIR}/slurm/common.sh"
train "$@"
