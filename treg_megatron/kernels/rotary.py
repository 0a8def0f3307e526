"""Rotary position embedding in three passes over memory, where Transformer Engine's kernel is not installed.

Megatron's own path for PyTorch takes six passes forward and more backward: negation, two concatenations and their
gradients move as many bytes as the products. The result is the same (arXiv 2104.09864, equation 34).
"""

import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor

_megatrons = rope_utils._apply_rotary_pos_emb_bshd


def use_torch_rotation() -> None:
    """Have Megatron rotate queries and keys by :func:`rotated`, for the life of the process. Idempotent."""
    rope_utils._apply_rotary_pos_emb_bshd = _apply


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin, and its gradient: the rotation by the opposite angle.

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


def _apply(
    t: Tensor,
    freqs: Tensor,
    rotary_interleaved: bool = False,
    multi_latent_attention: bool = False,
    mscale: float = 1.0,
) -> Tensor:
    if rotary_interleaved or multi_latent_attention or freqs.shape[-1] != t.shape[-1]:
        return _megatrons(t, freqs, rotary_interleaved, multi_latent_attention, mscale)
    return rotated(t, *_cos_and_sin(freqs, mscale, t.dtype))


def _cos_and_sin(freqs: Tensor, mscale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Kept with the angles where all layers get the same ones."""
    kept = freqs.__dict__.setdefault("cos_and_sin", {})
    if (mscale, dtype) not in kept:
        kept[mscale, dtype] = (freqs.cos() * mscale).to(dtype), (freqs.sin() * mscale).to(dtype)
    return kept[mscale, dtype]
