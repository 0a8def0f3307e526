"""Allocator settings for CPU tensors: every step allocates and frees the same gigabytes."""

import ctypes
import os


def keep_memory() -> None:
    """Keep freed memory for the next tensor, and use huge pages for large tensors, for the rest of the process.

    By default glibc returns large freed blocks to the system, so each step would page-fault the same memory in again.
    Call it before the first tensor is created. Idempotent.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it when it first allocates
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_MMAP_MAX, 0)
