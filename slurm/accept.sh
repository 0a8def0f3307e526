#!/usr/bin/env bash
# sbatch slurm/accept.sh [--only CHECK ...]
#
# Asks one node what only its GPUs can tell (docs/HARDWARE.md); the card is acceptance-JOB/acceptance.md.
#SBATCH --job-name=accept
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.log
RECIPE=""
# shellcheck source=slurm/common.sh
source "${TREG:-$SLURM_SUBMIT_DIR}/slurm/common.sh"
once "$PYTHON" -m treg_megatron accept --output "acceptance-$SLURM_JOB_ID" "$@"
