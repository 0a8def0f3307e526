"""Packed sequences in which a prefix that sequences share is stored once.

Training, where the two sides of a pair share their prompt, and labelling, where a response is scored after several
prompts, build their rows here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from treg_megatron.kernels.attention import Span


class PrefixRow(NamedTuple):
    """Several sequences as one packed sequence of t tokens.

    Attributes:
        tokens: [t] int64.
        positions: [t] int64, each token's position in its own sequence.
        spans: what each sequence adds, in order; those that add nothing have none.
        places: for each sequence [its length] int64, where its tokens are.
    """

    tokens: np.ndarray
    positions: np.ndarray
    spans: list[Span]
    places: list[np.ndarray]


def prefix_row(sequences: Sequence[np.ndarray], shared: Sequence[int]) -> PrefixRow:
    """The row of sequences, [s] integers each, of which each adds what it does not share with its predecessor.

    Args:
        shared: number of tokens that each sequence shares with the one before it; that of the first is 0.
    """
    tokens, positions, spans, places = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [], []
    pieces: list[tuple[int, int]] = []  # of the sequence before, as in Span.prefix
    place, filled = np.zeros(0, np.int64), 0
    for sequence, common in zip(sequences, shared, strict=True):
        pieces, new = _first(pieces, common), len(sequence) - common
        if new:
            spans.append(Span(new, tuple(pieces)))
            pieces = [*pieces, (len(spans) - 1, new)]
            tokens.append(np.asarray(sequence[common:], np.int64))
            positions.append(np.arange(common, len(sequence)))
        place = np.concatenate([place[:common], np.arange(filled, filled + new)])
        places.append(place)
        filled += new
    return PrefixRow(np.concatenate(tokens), np.concatenate(positions), spans, places)


def _first(pieces: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """The first ``count`` tokens of pieces."""
    kept = []
    for span, tokens in pieces:
        if count <= 0:
            break
        kept.append((span, min(tokens, count)))
        count -= tokens
    return kept
