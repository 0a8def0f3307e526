# shellcheck shell=bash disable=SC2034
# Settings of your cluster. Copy this file to slurm/site.sh, which git ignores, and edit it; every script sources it in
# the job. Also `source slurm/site.sh` before you submit, because sbatch reads the SBATCH_* variables.

# -- accounting: read by sbatch
export SBATCH_ACCOUNT=my_account
export SBATCH_PARTITION=batch

# -- software: either a container (pyxis and enroot) ...
CONTAINER_IMAGE=""                      # /shared/images/nemo.sqsh or nvcr.io#nvidia/nemo:TAG; empty: no container
CONTAINER_MOUNTS=""                     # /shared:/shared,/scratch:/scratch; empty: the repository and where you submit
# CONTAINER_NAME=""                     # where pyxis refuses --container-name: every step imports the image again
# ... or modules and an environment that all nodes see
# module load cuda/12.8
PYTHON="${PYTHON:-python}"              # /shared/venvs/treg/bin/python

# -- network
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# Where a node's short name is an address of the wrong network; rank 0 is on the first node.
# if [[ -n ${SLURM_JOB_ID:-} ]]; then MASTER_ADDR="$(first_node)-ib0"; fi
# MASTER_PORT=29500                     # where a firewall leaves only some ports open; default: from the job's id

# -- caches: not in the home folder, which is small and slow on many clusters
# export HF_HOME=/scratch/$USER/huggingface TRITON_CACHE_DIR=/tmp/triton-$USER
