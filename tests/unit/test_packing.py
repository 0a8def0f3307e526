"""Bins: every pair is in exactly one, unsplit, and the bins do not depend on the number of ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treg_megatron.data.packing import BinOrder, micro_batches, most_bins, pack, pair_lengths
from treg_megatron.errors import UserError

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=40).map(np.array)


@given(lengths=lengths, size=st.integers(50, 120))
def test_items_are_kept_whole_and_fit(lengths, size):
    bins = pack(lengths, size)
    assert sorted(sum(bins, [])) == list(range(len(lengths)))
    assert all(bin and lengths[bin].sum() <= size for bin in bins)
    assert all(lengths[bins[i]].sum() + lengths[bins[j]].sum() > size for i in range(len(bins)) for j in range(i))


def walk(lengths, ranks, count, first_step=0, **order):
    """The bins of each step, over all ranks."""
    steps = []
    for rank in range(ranks):
        bins = list(BinOrder(lengths, 60, 6, rank, ranks, micro_batches=count, first_step=first_step, **order))
        assert all(lengths[bin].sum() <= 60 for bin in bins)
        steps.append([bins[i : i + count] for i in range(0, len(bins), count)])
    return [sorted(filter(None, sum(of_ranks, []))) for of_ranks in zip(*steps, strict=True)]


@given(
    lengths=lengths,
    ranks=st.integers(1, 3),
    others=st.integers(1, 3),
    seed=st.none() | st.integers(0, 9),
    data=st.data(),
)
def test_every_pair_once_an_epoch_whatever_the_ranks_and_the_interruption(lengths, ranks, others, seed, data):
    most = most_bins(lengths, 60, 6, epochs=2, seed=seed)
    steps = walk(lengths, ranks, micro_batches(most, ranks), epochs=2, seed=seed)
    for epoch in (steps[: len(steps) // 2], steps[len(steps) // 2 :]):
        assert sorted(pair for step in epoch for bin in step for pair in bin) == list(range(len(lengths)))
    stop = data.draw(st.integers(0, len(steps)))
    assert walk(lengths, others, micro_batches(most, others), stop, epochs=2, seed=seed) == steps[stop:]


def test_bins_of_log_normal_lengths_are_nearly_full():
    """Random log-normal lengths with mean 2 x (230 + 260) tokens, truncated at 2 x 2048."""
    random = np.random.default_rng(0)
    lengths = np.minimum(random.lognormal(np.log(850), 0.55, 12_800), 4096).astype(np.int64)
    order = BinOrder(lengths, 8192, 128, 0, 1, micro_batches=1, seed=1)
    bins = [bin for step in range(order.steps) for bin in order.bins(step)]
    assert lengths.sum() / (8192 * len(bins)) > 0.95


def test_a_pair_longer_than_a_bin_is_refused():
    with pytest.raises(UserError, match="train: pair 1 has 9 tokens in both sequences, more than data.bin_size=8"):
        pair_lengths(np.array([[1, 2], [4, 5]]), 8, "train")
    with pytest.raises(ValueError, match="an item of 9"):
        pack(np.array([9]), 8)
