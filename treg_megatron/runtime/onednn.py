"""Matrix products by oneDNN on processors where MKL, torch's choice for fp32, is slower.

MKL takes its widest kernels on Intel's processors only. On an AMD EPYC (two cores, torch 2.13, 2026-11-25) it reaches 190
GFLOP/s, but 125 where the result outgrows the cache, as logits and gate and up projections do. oneDNN, which torch ships
too and takes for bf16, reaches 200 to 215 on either.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SMALLEST = 1 << 24  # multiplications; oneDNN compiles a kernel for each new shape, in a millisecond, and a model repeats them


def product_of(func: Callable, args: tuple, kwargs: dict) -> Tensor | None:
    """What ``func(*args)`` gives, by oneDNN, or None where that is no product, not fp32, small, or better left to MKL.

    oneDNN's product has no gradient: a product that autograd would record is left alone.
    """
    if func not in _PRODUCTS or kwargs or len(args) != 2 or torch.is_grad_enabled() or not mkl_is_slow():
        return None
    a, b = args
    if a.dtype != torch.float32 or b.dtype != torch.float32 or a.dim() < 2 or b.dim() != 2 or not a.is_contiguous() \
            or a.numel() * b.shape[1] < SMALLEST:
        return None
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


_PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.mm}


@cache
def mkl_is_slow() -> bool:
    """Whether this is an x86 processor of another maker than MKL's, and torch has oneDNN."""
    cpuinfo = Path("/proc/cpuinfo")
    vendors = {line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("vendor_id")} \
        if cpuinfo.exists() else set()
    return bool(vendors - {"GenuineIntel"}) and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
