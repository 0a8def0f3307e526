# shellcheck shell=bash disable=SC2034
# Settings of your cluster. Copy this file to slurm/site.sh, which git ignores, and edit it; every script sources it in
# the job. Also `source slurm/site.sh` before you submit, because sbatch reads the SBATCH_* variables.

# -- accounting: read by sbatch
export SBATCH_ACCOUNT=my_account
export SBATCH_PARTITION=batch

# -- software: one of three; docs/CLUSTER.md says which images fit
# 1. pyxis and enroot: the image of container/Dockerfile, or NVIDIA's as it is
# CONTAINER_IMAGE=nvcr.io#nvidia/nemo:26.02           # or /shared/images/treg.sqsh
# CONTAINER_MOUNTS=/shared:/shared,/scratch:/scratch  # left out: the repository and where you submit
# CONTAINER_NAME=""                                 # where pyxis refuses --container-name
# 2. Apptainer: the image of container/treg.def; it is the interpreter that starts in the container
# PYTHON="$TREG/container/apptainer_python.sh"
# export APPTAINER_IMAGE=/shared/images/treg.sif APPTAINER_BINDPATH=/shared,/scratch
# 3. an environment that all nodes see
# module load cuda/12.8
# PYTHON=/shared/venvs/treg/bin/python

# -- network
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# Where a node's short name is an address of the wrong network; rank 0 is on the first node.
# if [[ -n ${SLURM_JOB_ID:-} ]]; then MASTER_ADDR="$(first_node)-ib0"; fi
# MASTER_PORT=29500                     # where a firewall leaves only some ports open; default: from the job's id

# -- caches: not in the home folder, which is small and slow on many clusters
# export HF_HOME=/scratch/$USER/huggingface TRITON_CACHE_DIR=/tmp/triton-$USER
