"""Allocator settings for tensors on a CPU, where every step allocates and frees the same gigabytes."""

import ctypes
import os


def keep_memory() -> None:
    """Keep what is freed for the next tensor, and take large tensors in huge pages, for the life of the process.

    glibc gives large blocks back to the system when they are freed, and a step would fault in the same pages again.
    Call it before the first tensor. Idempotent.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it when it first allocates
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)
