"""CUDA's hardware queues: in how many the kernels of a process wait, which CUDA reads once, when it starts."""

import logging
import os
import shutil
import subprocess

from treg_megatron.config.schema import ParallelSection

VARIABLE = "CUDA_DEVICE_MAX_CONNECTIONS"
HOPPER = 9  # major compute capability
SMI_SECONDS = 60
logger = logging.getLogger(__name__)


def set_connections(parallel: ParallelSection) -> None:
    """Set CUDA_DEVICE_MAX_CONNECTIONS as the layout wants it, before CUDA starts; a value that is set already stays.

    A log line says so where that value is another than the layout wants.
    """
    if parallel.tensor == parallel.context == 1 or not (architecture := major_capability()):
        return
    wanted = connections(architecture)
    found = os.environ.setdefault(VARIABLE, wanted)
    if found != wanted:
        logger.warning("%s=%s, as the environment says; on these GPUs this layout wants %s", VARIABLE, found, wanted)


def connections(architecture: int) -> str:
    """The number of queues with which tensor- or context-parallel communication overlaps with computation.

    One up to Hopper: kernels then start in the order of their calls, so that communication starts before the matrix
    product that would hold it up. From Blackwell on there is no need for it, and more queues than CUDA's 8 keep streams
    apart. Both as in NeMo's ``MegatronCommOverlapCallback``.

    Args:
        architecture: major compute capability of the GPUs.
    """
    return "1" if architecture <= HOPPER else "32"


def major_capability() -> int | None:
    """Major compute capability of this node's GPUs, from nvidia-smi, because torch would start CUDA; None without any.

    Where nvidia-smi is missing or older than this question (driver 510), Hopper's.
    """
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return HOPPER if os.path.exists("/dev/nvidia0") else None
    try:
        done = subprocess.run(
            [smi, "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=SMI_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return HOPPER
    first = done.stdout.strip().split("\n")[0].split(".")[0]
    return int(first) if first.isdigit() else HOPPER
