"""Causal attention over the sequences of a packed row, with torch's flash attention kernel for CPUs.

With one kernel call per sequence, autograd would split the row and concatenate it again in both passes: a dozen small
operations per sequence and layer. Here results and gradients are written directly into the row.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from treg_megatron.kernels.attention import Span, causal_mask, rows_to_add
from treg_megatron.kernels.core_attention import PackedRow, SdpaAttention, spans_of


class PackedSdpaAttention(SdpaAttention):
    """Packed sequences in one autograd call, for plain causal attention: no window, soft-cap or dropout."""

    def attend_packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedRow) -> Tensor:
        if self.tokens_before is not None or self.softcap is not None or (self.training and self.dropout):
            return super().attend_packed(query, key, value, packed)
        return packed_attention(query, key, value, spans_of(packed, len(query)), self.softmax_scale).flatten(1)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span], scale: float) -> Tensor:
    """Queries [t, heads, d], keys and values [t, groups, d] -> [t, heads, d]; the spans cover all t tokens."""
    return _PackedAttention.apply(query, key, value, spans, scale)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, spans, scale):
        out, normalisers = torch.empty_like(query), []
        for rows, prompt in _slices(spans):
            q, k, v = query[rows], _with_prompt(prompt, key, rows), _with_prompt(prompt, value, rows)
            added, mask = _padding_and_mask(q, k)
            part, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _heads(q, added), _heads(k), _heads(v), 0.0, mask is None, attn_mask=mask, scale=scale
            )
            out[rows] = part[0, :, added:].transpose(0, 1)
            normalisers.append(normaliser)
        ctx.save_for_backward(query, key, value, out, *normalisers)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, *normalisers = ctx.saved_tensors
        grads = tuple(torch.empty_like(x) for x in (query, key, value))
        for (rows, prompt), normaliser in zip(_slices(ctx.spans), normalisers, strict=True):
            q, k, v = query[rows], _with_prompt(prompt, key, rows), _with_prompt(prompt, value, rows)
            added, mask = _padding_and_mask(q, k)
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
            before = prompt.stop - prompt.start
            for total, part in ((grads[1], grad_key), (grads[2], grad_value)):
                total[rows] = part[before:]
                if before:  # add to what the span before has written there
                    total[prompt] += part[:before]
        return *grads, None, None


def _slices(spans: Sequence[Span]) -> Iterator[tuple[slice, slice]]:
    """Rows of each span, and rows of its prompt."""
    before, start = 0, 0
    for span in spans:
        yield slice(start, start + span.tokens), slice(before, before + span.prompt)
        before, start = start, start + span.tokens


def _with_prompt(prompt: slice, x: Tensor, rows: slice) -> Tensor:
    return torch.cat([x[prompt], x[rows]]) if prompt.stop > prompt.start else x[rows]


def _padding_and_mask(query: Tensor, key: Tensor) -> tuple[int, Tensor | None]:
    """Number of rows of zeros to prepend to the queries, and the additive mask for the kernel, if it needs one."""
    added = rows_to_add(len(query), len(key))
    if len(query) + added == len(key):
        return added, None
    return 0, _added_mask(len(query), len(key), query.dtype)


@lru_cache(maxsize=4)  # all layers use the masks of the same row, forward and backward
def _added_mask(queries: int, length: int, dtype: torch.dtype) -> Tensor:
    """[queries, s]: 0 where a query sees a key, minus infinity elsewhere."""
    seen = causal_mask(queries, length, None, torch.device("cpu"))
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)


def _heads(x: Tensor, added: int = 0) -> Tensor:
    """[n, heads, d] -> [1, heads, added + n, d]"""
    return F.pad(x.transpose(0, 1), (0, 0, added, 0))[None] if added else x.transpose(0, 1)[None]
