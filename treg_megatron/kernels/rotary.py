"""Rotary position embedding in three passes over memory, for use without Transformer Engine's kernel.

Megatron's PyTorch implementation takes six passes forward and more backward: negation, two concatenations and their
gradients move as many bytes as the multiplications. The result is the same (arXiv 2104.09864, equation 34).
"""

import math

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


def yarn_frequencies(
    frequencies: Tensor,
    base: float,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    original_max_position_embeddings: int,
    truncate: bool,
) -> Tensor:
    """YaRN's frequencies (arXiv 2309.00071, section 3.2): those of channels that turn less than ``beta_slow`` times
    within the original context are divided by ``factor``, those that turn more than ``beta_fast`` times are kept, and
    between them the share that is kept falls linearly with the channel.

    Args:
        frequencies: [d / 2] fp32, radians per position, ``base`` ** (-2 i / d).
        truncate: round the two ends outward to whole channels.
    """
    channels = 2 * len(frequencies)

    def channel_that_turns(times: float) -> float:
        wavelength = original_max_position_embeddings / times
        return channels * math.log(wavelength / (2 * math.pi)) / (2 * math.log(base))

    first, last = channel_that_turns(beta_fast), channel_that_turns(beta_slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    channel = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    # as in transformers where both ends are one channel
    kept = 1 - ((channel - first) / (last - first or 0.001)).clamp(0, 1)
    return frequencies / factor * (1 - kept) + frequencies * kept
