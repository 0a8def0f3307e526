"""A packed row in one call against its sequences one by one, with full score matrices in float64."""

from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_attention import CHANNELS, GROUPS, HEADS, SCALE, plain
from treg_megatron.data.prefixes import PrefixRow, prefix_row
from treg_megatron.kernels.packed_attention import packed_attention


@st.composite
def rows_of_sequences(draw) -> PrefixRow:
    """Sequences of which each shares as much with the one before as is drawn."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=6))
    shared = [0, *(draw(st.integers(0, min(pair))) for pair in pairwise(lengths))]
    return prefix_row([np.zeros(length, np.int64) for length in lengths], shared)


def one_by_one(query, key, value, row):
    """[t, heads, d]: the last queries of every whole sequence are those of its span."""
    parts = torch.zeros_like(query)
    for place in reversed(row.places):
        out = plain(*(x[place].transpose(0, 1)[None] for x in (query, key, value)))
        parts = parts.index_copy(0, torch.from_numpy(place), out[0].transpose(0, 1).type_as(parts))
    return parts


@given(row=rows_of_sequences(), seed=st.integers(0, 99))
def test_equals_sequences_one_by_one(row, seed):
    tokens = len(row.tokens)
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(tokens, n, CHANNELS, generator=generator).requires_grad_() for n in (HEADS, GROUPS, GROUPS)]
    upstream = torch.randn(tokens, HEADS, CHANNELS, generator=generator)
    results = []
    for out in (packed_attention(*tensors, row.spans, SCALE, {}), one_by_one(*tensors, row)):
        results.append((out, *torch.autograd.grad((out * upstream).sum(), tensors)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)
