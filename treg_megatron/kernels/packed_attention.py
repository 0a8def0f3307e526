"""Causal attention over the sequences of a packed row, with torch's flash attention kernel for CPUs.

With one kernel call per sequence, autograd would split the row and concatenate it again in both passes: a dozen small
operations per sequence and layer. Here results and gradients are written directly into the row.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from treg_megatron.kernels.attention import Span, causal_mask, rows_to_add
from treg_megatron.kernels.core_attention import PackedRow, SdpaAttention


class PackedSdpaAttention(SdpaAttention):
    """Packed sequences in one autograd call, for plain causal attention: no window, soft-cap or dropout."""

    def attend_packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedRow) -> Tensor:
        if self.tokens_before is not None or self.softcap is not None or (self.training and self.dropout):
            return super().attend_packed(query, key, value, packed)
        return packed_attention(query, key, value, packed.spans, self.softmax_scale, packed.masks).flatten(1)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], scale: float, masks: dict[Any, Tensor]
) -> Tensor:
    """Queries [t, heads, d], keys and values [t, groups, d] -> [t, heads, d]; the spans cover all t tokens.

    All layers use the ``masks`` of a row, forward and backward: they are added to it when they are first needed.
    """
    return _PackedAttention.apply(query, key, value, spans, scale, masks)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, spans, scale, masks):
        out, normalisers = torch.empty_like(query), []
        for rows, prefix in _slices(spans):
            q, k, v = query[rows], _with_prefix(prefix, key, rows), _with_prefix(prefix, value, rows)
            added, mask = _padding_and_mask(q, k, masks)
            part, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _heads(q, added), _heads(k), _heads(v), 0.0, mask is None, attn_mask=mask, scale=scale
            )
            out[rows] = part[0, :, added:].transpose(0, 1)
            normalisers.append(normaliser)
        ctx.save_for_backward(query, key, value, out, *normalisers)
        ctx.spans, ctx.scale, ctx.masks = spans, scale, masks
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, *normalisers = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in (query, key, value))
        for (rows, prefix), normaliser in zip(_slices(ctx.spans), normalisers, strict=True):
            q, k, v = query[rows], _with_prefix(prefix, key, rows), _with_prefix(prefix, value, rows)
            added, mask = _padding_and_mask(q, k, ctx.masks)
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads(grad[rows], added),
                _heads(q, added),
                _heads(k),
                _heads(v),
                _heads(out[rows], added),
                normaliser,
                0.0,
                mask is None,
                attn_mask=mask,
                scale=ctx.scale,
            )
            grad_query, grad_key, grad_value = (part[0].transpose(0, 1) for part in parts)
            grads[0][rows] = grad_query[added:]
            for total, part in ((grads[1], grad_key), (grads[2], grad_value)):
                start = 0
                for before in prefix:  # add to what the earlier spans have written there
                    total[before] += part[start : start + before.stop - before.start]
                    start += before.stop - before.start
                total[rows] = part[start:]
        return *grads, None, None, None


def _slices(spans: Sequence[Span]) -> Iterator[tuple[slice, list[slice]]]:
    """Rows of each span, and rows of the pieces of its prefix."""
    starts = [0, *itertools.accumulate(span.tokens for span in spans)]
    for span, start in zip(spans, starts, strict=False):
        yield slice(start, start + span.tokens), [slice(starts[i], starts[i] + n) for i, n in span.prefix]


def _with_prefix(prefix: list[slice], x: Tensor, rows: slice) -> Tensor:
    return torch.cat([*(x[before] for before in prefix), x[rows]]) if prefix else x[rows]


def _padding_and_mask(query: Tensor, key: Tensor, masks: dict[Any, Tensor]) -> tuple[int, Tensor | None]:
    """Number of rows of zeros to prepend to the queries, and the additive mask for the kernel, if it needs one."""
    added = rows_to_add(len(query), len(key))
    if len(query) + added == len(key):
        return added, None
    shape = len(query), len(key)
    if shape not in masks:
        seen = causal_mask(*shape, None, query.device)
        masks[shape] = torch.zeros(shape, dtype=query.dtype).masked_fill_(~seen, -torch.inf)
    return 0, masks[shape]


def _heads(x: Tensor, added: int = 0) -> Tensor:
    """[n, heads, d] -> [1, heads, added + n, d]"""
    return F.pad(x.transpose(0, 1), (0, 0, added, 0))[None] if added else x.transpose(0, 1)[None]
