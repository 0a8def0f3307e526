#!/usr/bin/env bash
# Python of an Apptainer image, for PYTHON in slurm/site.sh. Apptainer passes the environment on: ranks, address, PYTHONPATH.
#   APPTAINER_IMAGE      the image that container/treg.def builds
#   APPTAINER_BINDPATH   folders of the cluster to show inside, read by Apptainer itself
set -euo pipefail
if [[ -z ${APPTAINER_IMAGE:-} ]]; then
    echo "error: APPTAINER_IMAGE names no image: set it in slurm/site.sh" >&2
    exit 2
fi
# --nv: the GPUs and their driver. The clone and the folder of the job must be visible wherever they lie.
exec apptainer exec --nv --bind "${TREG:-$PWD},$PWD" --pwd "$PWD" "$APPTAINER_IMAGE" python "$@"
