"""Rotary position embedding in three passes over memory, for use without Transformer Engine's kernel.

Megatron's PyTorch implementation takes six passes forward and more backward: negation, two concatenations and their
gradients move as many bytes as the multiplications. The result is the same (arXiv 2104.09864, equation 34).
"""

import torch
from torch import Tensor


def rotated_by(x: Tensor, angles: Tensor) -> Tensor:
    """x rotated by ``angles``; channels of ``x`` beyond those of ``angles`` are left unchanged.

    Args:
        x: [..., d] of any floating dtype.
        angles: [..., channels] fp32, of a shape that broadcasts to ``x``; its two halves are equal.
    """
    channels = angles.shape[-1]
    rotation = _cos_and_sin(angles, x.dtype)
    if channels == x.shape[-1]:
        return rotated(x, *rotation)
    return torch.cat([rotated(x[..., :channels], *rotation), x[..., channels:]], dim=-1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin; its gradient is the rotation by the opposite angle.

    Args:
        x: [..., d] of any floating dtype.
        cos, sin: of a shape that broadcasts to ``x``; their two halves of the last dimension are equal.
    """
    return _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    sin = sin.chunk(2, dim=-1)[0]
    out = x * cos
    out_first, out_second = out.chunk(2, dim=-1)
    out_first.addcmul_(second, sin, value=-direction)
    out_second.addcmul_(first, sin, value=direction)
    return out


def _cos_and_sin(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines, cached on the tensor of angles, which all layers share."""
    kept = angles.__dict__.setdefault("cos_and_sin", {})
    if dtype not in kept:
        kept[dtype] = angles.cos().to(dtype), angles.sin().to(dtype)
    return kept[dtype]
