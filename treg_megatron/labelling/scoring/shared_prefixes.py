"""Packed sequences with shared prefixes stored once, and attention over them.

In the order of their tokens, each sequence shares its longest prefix with its predecessor. The packed sequence is built
in that order: it takes from each sequence only the tokens that its predecessor lacks, as one *segment*, whose keys are
those of the shared prefix followed by its own. No token is computed twice and none is padding.

Shapes: t tokens of the packed sequence, n of a segment, p of its prefix, d head size. A "row" is one packed sequence;
its "rows" are indices of tokens in it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from treg_megatron.kernels.attention import causal_mask, soft_capped_attention

#: name under which transformers finds :func:`attention`
ATTENTION = "treg_shared_prefixes"

_WORTH_SHARING = 8  # tokens: for a shorter prefix, attention without a mask saves more


class Segment(NamedTuple):
    """Tokens ``start`` to ``stop`` of the row; ``prefix`` ([p] int64) holds the indices of the tokens before them."""

    start: int
    stop: int
    prefix: np.ndarray


class Row(NamedTuple):
    """Several sequences as one packed sequence.

    Attributes:
        tokens: [t] int64.
        positions: [t] int64, each token's position in its own sequence.
        segments: the segments in the order of their tokens.
        rows: for each sequence [its length] int64, the indices of its tokens.
        keys: for each segment [p + n] int64, the indices of all its keys; None for a segment without a prefix.
        masks: a cache, filled during attention.
    """

    tokens: Tensor
    positions: Tensor
    segments: list[Segment]
    rows: list[np.ndarray]
    keys: list[Tensor | None]
    masks: dict[tuple[int, int | None], Tensor]


def in_order(sequences: Sequence[np.ndarray]) -> list[int]:
    """Indices of the sequences sorted by their tokens, which makes sequences with a common prefix neighbours."""
    return sorted(range(len(sequences)), key=lambda i: sequences[i].astype(">u4").tobytes())


def portions(sequences: Sequence[np.ndarray], budget: int) -> Iterator[list[int]]:
    """Indices of the sequences of each row: sorted, as many as fit into ``budget`` tokens, at least one."""
    portion: list[int] = []
    tokens = 0
    for i in in_order(sequences):
        new = len(sequences[i]) - (shared_length(sequences[portion[-1]], sequences[i]) if portion else 0)
        if portion and tokens + new > budget:
            yield portion
            portion, tokens, new = [], 0, len(sequences[i])
        portion.append(i)
        tokens += new
    if portion:
        yield portion


def shared_length(first: np.ndarray, second: np.ndarray) -> int:
    """The length of the common prefix of two sequences; 0 if it is too short to be worth sharing."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    shared = int(different.argmax()) if different.any() else length
    return shared if shared >= _WORTH_SHARING or shared == len(second) else 0


def one_row(sequences: Sequence[np.ndarray], device: torch.device) -> Row:
    """The row of sequences that are already sorted :func:`in_order`."""
    segments, rows, tokens, positions = [], [], [], []
    filled = 0
    for number, sequence in enumerate(sequences):
        shared = shared_length(sequences[number - 1], sequence) if number else 0
        prefix = rows[-1][:shared] if shared else np.zeros(0, np.int64)
        new = len(sequence) - shared
        if new:
            segments.append(Segment(filled, filled + new, prefix))
            tokens.append(sequence[shared:])
            positions.append(np.arange(shared, len(sequence)))
        rows.append(np.concatenate([prefix, np.arange(filled, filled + new)]))
        filled += new
    keys = [
        torch.from_numpy(np.concatenate([s.prefix, np.arange(s.start, s.stop)])).to(device) if len(s.prefix) else None
        for s in segments
    ]
    return Row(
        torch.from_numpy(np.concatenate(tokens).astype(np.int64)).to(device),
        torch.from_numpy(np.concatenate(positions)).to(device),
        segments,
        rows,
        keys,
        {},
    )


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None = None,
    *,
    row: Row,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each segment to its prefix and itself, with the signature of a transformers attention.

    Shapes: query [1, heads, t, d], key and value [1, key-value heads, t, d] -> [1, t, heads, d].
    """
    outputs = []
    for number, (segment, keys) in enumerate(zip(row.segments, row.keys, strict=True)):
        own = slice(segment.start, segment.stop)
        near = [x[:, :, own] if keys is None else x.index_select(2, keys) for x in (key, value)]
        mask = _mask(row, number, sliding_window)
        outputs.append(_attend(query[:, :, own], *near, mask, scaling, softcap).transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def _mask(row: Row, number: int, window: int | None) -> Tensor | None:
    """[n, p + n] bool, True where a query sees a key; None where plain causal attention needs no mask."""
    segment = row.segments[number]
    length = len(segment.prefix) + segment.stop - segment.start
    window = None if window is None or window >= length else window
    if len(segment.prefix) == 0 and window is None:
        return None
    if (number, window) not in row.masks:
        before = None if window is None else window - 1
        row.masks[number, window] = causal_mask(length - len(segment.prefix), length, before, row.tokens.device)
    return row.masks[number, window]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """[1, heads, n, d], [1, key-value heads, p + n, d] -> [1, heads, n, d]."""
    if softcap is not None:
        if mask is None:
            mask = causal_mask(query.shape[2], key.shape[2], None, query.device)
        return soft_capped_attention(query, key, value, mask, scaling, softcap)
    grouped = query.shape[1] != key.shape[1]
    if grouped and query.is_cuda:  # no fused CUDA kernel takes both a mask and grouped heads
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )
