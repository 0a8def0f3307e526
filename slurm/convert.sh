#!/usr/bin/env bash
# sbatch slurm/convert.sh import|export [section.key=value ...]
#
# Converts a Hugging Face folder to a Megatron checkpoint, or a run's newest checkpoint to a Hugging Face folder. Needs no
# GPU and little memory: weights are streamed.
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
if [[ ${1:-} != import && ${1:-} != export ]]; then
    echo "usage: sbatch slurm/convert.sh import|export [section.key=value ...]" >&2
    exit 2
fi
RECIPE="${RECIPE:-llama3_70b}"
# shellcheck source=slurm/common.sh
source "${TREG:-$SLURM_SUBMIT_DIR}/slurm/common.sh"
record "${@:2}"
once "$PYTHON" "$TREG/tools/convert_checkpoint.py" "$1" --recipe "$RECIPE" "${@:2}"
