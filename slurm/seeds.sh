#!/usr/bin/env bash
# sbatch [--array=1-5%2] slurm/seeds.sh [section.key=value ...]
#
# Trains recipes/llama3_8b.yaml once for each seed, a job each: the job's number in the array is the seed of the model and of
# the order of the pairs, and its run is beside the recipe's, TRAIN.OUTPUT-seed3. Each resumes as treg_8b.sh does.
#SBATCH --job-name=seeds
#SBATCH --array=1-3
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
if [[ -z ${SLURM_ARRAY_TASK_ID:-} || -n ${CHAIN:-} ]]; then
    echo "error: slurm/seeds.sh takes its seed from its place in an array, and a follow-up job (CHAIN) would have none" >&2
    exit 2
fi
# shellcheck source=slurm/common.sh
source "${TREG:-$SLURM_SUBMIT_DIR}/slurm/common.sh"
output=$(setting train.output "$@")
seed=$SLURM_ARRAY_TASK_ID
train "$@" "train.seed=$seed" "data.seed=$seed" "train.output=$output-seed$seed"
