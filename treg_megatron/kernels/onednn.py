"""Matrix products with oneDNN on processors where MKL, torch's default for fp32, is slower.

MKL uses its widest kernels only on Intel processors. On an AMD EPYC (two cores, torch 2.13, 2026-11-25) it reaches
190 GFLOP/s, but only 156 for gate and up projections and 127 for logits, whose results exceed the cache. oneDNN, which
torch also ships and uses for bf16, reaches 200 to 215 for all of them.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# smallest number of multiplications worth a kernel: oneDNN takes a millisecond to compile one per new shape
SMALLEST = 1 << 24


class ProductsByOneDNN(TorchFunctionMode):
    """Mode that computes the matrix products called in it with :func:`product_of`, where that returns a result."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        product = product_of(func, args, kwargs)
        return func(*args, **kwargs) if product is None else product


def product_of(func: Callable, args: tuple, kwargs: dict) -> Tensor | None:
    """``func(*args)`` computed by oneDNN; None if it is not a matrix product, not fp32, small, or faster with MKL.

    oneDNN's operator is not differentiable, so products that autograd would record are left to torch.
    """
    if func not in _PRODUCTS or kwargs or len(args) < 2 or torch.is_grad_enabled() or not mkl_is_slow():
        return None
    a, b, *bias = args
    row_major = a.is_cpu and a.dim() > 1 and a.is_contiguous() and b.dim() == 2
    if not row_major or {a.dtype, b.dtype} != {torch.float32}:
        return None
    weight = b if func is F.linear else b.t()
    if a.numel() * len(weight) < SMALLEST:
        return None
    return torch.ops.mkldnn._linear_pointwise(a, weight, bias[0] if bias else None, "none", [], "")


_PRODUCTS = {torch.matmul, torch.Tensor.matmul, torch.mm, F.linear}


@cache
def mkl_is_slow() -> bool:
    """Whether torch has MKL and oneDNN, and the x86 processor is not made by Intel."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    makers = {line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")}
    return bool(makers - {"GenuineIntel"})
