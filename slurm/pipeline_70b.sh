#!/usr/bin/env bash
# bash slurm/pipeline_70b.sh [section.key=value ...]
#
# Submits label, index, train and export as one chain: each job starts when the one before has succeeded; if one fails, the
# later ones are cancelled. Import the checkpoint first (slurm/convert.sh import). With EVALUATE=yes the exported model then
# answers the prompts evaluate.prompts; slurm/evaluate.sh says what else it takes from the environment.
set -euo pipefail
# Passed on to every job with the environment.
TREG="${TREG:-$(cd "$(dirname "$0")/.." && pwd)}"
export TREG RECIPE="${RECIPE:-llama3_70b}"

after() { sbatch --parsable --dependency="afterok:$1" --kill-on-invalid-dep=yes "${@:2}"; }

label=$(sbatch --parsable "$TREG/slurm/label_70b.sh" "$@")
index=$(after "$label" "$TREG/slurm/index.sh" "$@")
train=$(after "$index" "$TREG/slurm/treg_70b.sh" "$@")
export=$(after "$train" "$TREG/slurm/convert.sh" export "$@")
said="label $label, index $index, train $train, export $export"
if [[ -n ${EVALUATE:-} ]]; then said+=", evaluate $(after "$export" "$TREG/slurm/evaluate.sh" "$@")"; fi
echo "$said"
