"""Which sequences share a forward pass, and attention over them in a Hugging Face model.

In the order of their tokens, each sequence shares its longest prefix with its predecessor. The packed sequence is built
in that order (:mod:`treg_megatron.data.prefixes`): it takes from each sequence only the tokens that its predecessor
lacks, as one span, whose keys are those of the shared prefix followed by its own. No token is computed twice and none
is padding.

Shapes: t tokens of the packed sequence, n of a span, p of its prefix, d head size. A "row" is one packed sequence; its
"rows" are indices of tokens in it.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from treg_megatron.data.prefixes import prefix_row
from treg_megatron.kernels.attention import Span, causal_mask, parts_of, soft_capped_attention

#: name under which transformers finds :func:`attention`
ATTENTION = "treg_shared_prefixes"

_WORTH_SHARING = 8  # tokens: for a shorter prefix, attention without a mask saves more
_PASS = 64  # tokens: what one more forward pass costs


class Row(NamedTuple):
    """Several sequences as one packed sequence.

    Attributes:
        tokens: [t] int64.
        positions: [t] int64, each token's position in its own sequence.
        spans: in the order of their tokens.
        rows: for each sequence [its length] int64, the indices of its tokens.
        masks: a cache, filled during attention.
    """

    tokens: Tensor
    positions: Tensor
    spans: list[Span]
    rows: list[np.ndarray]
    masks: dict[tuple[int, int, int | None], Tensor]


def in_order(sequences: Sequence[np.ndarray]) -> list[int]:
    """Indices of the sequences sorted by their tokens, which makes sequences with a common prefix neighbours."""
    return sorted(range(len(sequences)), key=lambda i: sequences[i].astype(">u4").tobytes())


def portions(sequences: Sequence[np.ndarray], budget: int, share: bool = True) -> Iterator[list[int]]:
    """Indices of the sequences of each row, sorted, such that the fewest tokens are computed.

    A row has at most ``budget`` tokens, or one sequence. Where rows are cut, a prefix is computed once more, so they
    are cut where little is shared (a shortest path over the sorted sequences).

    Args:
        share: whether a row holds a shared prefix once.
    """
    order = in_order(sequences)
    lengths = np.array([len(sequences[i]) for i in order])
    shared = np.array(shared_lengths([sequences[i] for i in order])) if share else np.zeros(len(order), int)
    added = np.cumsum(lengths - shared)  # tokens up to and including each sequence, if no row is cut
    # of the rows up to each sequence: what all cuts cost, and where the last row begins
    cost, begins = np.zeros(len(order) + 1), np.zeros(len(order) + 1, int)
    first = 0
    for end in range(1, len(order) + 1):
        while first < end - 1 and lengths[first] + added[end - 1] - added[first] > budget:
            first += 1
        cuts = cost[first:end] + shared[first:end] + _PASS
        begins[end] = first + int(cuts.argmin())
        cost[end] = cuts.min()
    ends = [len(order)]
    while ends[-1]:
        ends.append(int(begins[ends[-1]]))
    for begin, end in pairwise(reversed(ends)):
        yield order[begin:end]


def shared_lengths(sequences: Sequence[np.ndarray]) -> list[int]:
    """How many tokens each sequence shares with the one before it; 0 for the first."""
    return [0, *(shared_length(first, second) for first, second in pairwise(sequences))] if sequences else []


def shared_length(first: np.ndarray, second: np.ndarray) -> int:
    """The length of the common prefix of two sequences; 0 if it is too short to be worth sharing."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    shared = int(different.argmax()) if different.any() else length
    return shared if shared >= _WORTH_SHARING or shared == len(second) else 0


def one_row(sequences: Sequence[np.ndarray], device: torch.device) -> Row:
    """The row of sequences that are already sorted :func:`in_order`."""
    tokens, positions, spans, rows = prefix_row(sequences, shared_lengths(sequences))
    return Row(torch.from_numpy(tokens).to(device), torch.from_numpy(positions).to(device), spans, rows, {})


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
    """Causal attention of each span to its prefix and itself, with the signature of a transformers attention.

    Shapes: query [1, heads, t, d], key and value [1, key-value heads, t, d] -> [1, t, heads, d].
    """
    outputs = []
    for q, k, v in parts_of(*(x[0].transpose(0, 1) for x in (query, key, value)), row.spans):
        mask = _mask(row, len(q), len(k), sliding_window)
        outputs.append(_attend(*(x.transpose(0, 1)[None] for x in (q, k, v)), mask, scaling, softcap))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _mask(row: Row, queries: int, length: int, window: int | None) -> Tensor | None:
    """[n, p + n] bool, True where a query sees a key; None where plain causal attention needs no mask."""
    window = None if window is None or window >= length else window
    if queries == length and window is None:
        return None
    key = queries, length, window
    if key not in row.masks:
        before = None if window is None else window - 1
        row.masks[key] = causal_mask(queries, length, before, row.tokens.device)
    return row.masks[key]


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
