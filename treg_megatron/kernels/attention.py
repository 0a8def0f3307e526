"""Causal grouped-query attention for the last tokens of a sequence, on torch's fused kernels where possible."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Span(NamedTuple):
    """Consecutive tokens of a packed sequence, which attend to their prefix in earlier spans and to each other.

    Attributes:
        tokens: their number.
        prefix: in order, the number of an earlier span, counted from 0, and how many of its first tokens belong to it.
    """

    tokens: int
    prefix: Sequence[tuple[int, int]] = ()


def parts_of(
    query: Tensor, key: Tensor, value: Tensor, spans: Sequence[Span]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each span, its queries and the keys and values that they see: [t, heads, d] each -> [n, heads, d]."""
    own = list(zip(*(x.split([span.tokens for span in spans]) for x in (query, key, value)), strict=True))
    for span, (q, *seen) in zip(spans, own, strict=True):
        if span.prefix:
            before = [own[number][1:] for number, _ in span.prefix]
            seen = [
                torch.cat([*(x[i][:n] for x, (_, n) in zip(before, span.prefix, strict=True)), seen[i]])
                for i in range(2)
            ]
        yield q, *seen


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    tokens_before: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Queries [b, heads, q, d], keys and values [b, groups, s, d] -> [b, heads, q, d].

    Args:
        query: queries of the last q positions.
        tokens_before: how many preceding tokens a query sees; None: all.
        softcap: c of Gemma 2's c * tanh(scores / c), or None.
    """
    queries, length = query.shape[2], key.shape[2]
    slides = tokens_before is not None and length > tokens_before + 1
    if softcap is not None:
        mask = causal_mask(queries, length, tokens_before, query.device)
        return soft_capped_attention(query, key, value, mask, scale, softcap, dropout)
    added = 0 if slides else rows_to_add(queries, length)
    if added:
        query = F.pad(query, (0, 0, added, 0))
    mask = None
    if slides or queries + added < length:
        mask = causal_mask(queries, length, tokens_before, query.device)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        dropout_p=dropout,
    )
    return out[:, :, added:] if added else out


def rows_to_add(queries: int, length: int) -> int:
    """How many rows of zeros to prepend to the queries of the last positions. With as many queries as keys, fused
    kernels skip the half that the causal mask hides; if few queries are missing, padding costs less than that half."""
    missing = length - queries
    return missing if missing < queries else 0


def causal_mask(queries: int, length: int, tokens_before: int | None, device: torch.device) -> Tensor:
    """Mask, bool [queries, s], True where a query (row) sees a key: its own token and the ones before it, at most
    ``tokens_before`` (None: all). The queries are those of the last positions."""
    position = torch.arange(length, device=device)
    distance = position[length - queries :, None] - position
    return (distance >= 0) & (distance <= (length if tokens_before is None else tokens_before))


def soft_capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float, dropout: float = 0.0
) -> Tensor:
    """Attention with scores capped to c * tanh(scores / c); scores and softmax in fp32.

    Queries [b, heads, q, d], keys and values [b, groups, s, d], mask [q, s] -> [b, heads, q, d].
    """
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = (grouped @ key[:, :, None].transpose(-1, -2)).float() * scale
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -torch.inf)
    weights = F.dropout(scores.softmax(-1).type_as(value), dropout)
    return (weights @ value[:, :, None]).flatten(1, 2)
