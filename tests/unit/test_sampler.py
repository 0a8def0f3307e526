"""Every pair occurs exactly once per epoch, whatever the layout and wherever a run resumes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from treg_megatron.data.sampler import MicrobatchOrder

seeds = st.none() | st.integers(0, 9)  # None: the order of the file, as in validation
layouts = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))  # micro-batch, ranks, micro-batches


def walk(pairs: int, layout: tuple[int, int, int], **order) -> list[list[int]]:
    """The pairs of each step, over all ranks."""
    micro, ranks, micro_batches = layout
    steps = None
    for rank in range(ranks):
        sampler = MicrobatchOrder(pairs, micro, micro * ranks * micro_batches, rank, ranks, **order)
        batches = list(sampler)
        assert all(len(batch) <= micro for batch in batches)
        mine = [sum(batches[i : i + micro_batches], []) for i in range(0, len(batches), micro_batches)]
        steps = mine if steps is None else [a + b for a, b in zip(steps, mine, strict=True)]
    return steps


@given(pairs=st.integers(1, 60), layout=layouts, epochs=st.integers(1, 3), seed=seeds)
def test_every_pair_once_an_epoch(pairs, layout, epochs, seed):
    steps = walk(pairs, layout, epochs=epochs, seed=seed)
    per_epoch = len(steps) // epochs
    for epoch in range(epochs):
        seen = sum(steps[epoch * per_epoch : (epoch + 1) * per_epoch], [])
        assert sorted(seen) == list(range(pairs))


@given(pairs=st.integers(1, 60), layout=layouts, seed=seeds, data=st.data())
def test_resuming_on_another_layout_goes_on_where_the_first_stopped(pairs, layout, seed, data):
    micro, ranks, micro_batches = layout
    whole = walk(pairs, layout, epochs=2, seed=seed)
    stop = data.draw(st.integers(0, len(whole)))
    for other in ((micro, ranks, micro_batches), (micro * micro_batches, ranks, 1), (micro, ranks * micro_batches, 1)):
        rest = walk(pairs, other, epochs=2, seed=seed, first_step=stop)
        assert [sorted(step) for step in rest] == [sorted(step) for step in whole[stop:]]


def test_epochs_differ_and_validation_keeps_the_order_of_the_file():
    order = MicrobatchOrder(50, 1, 50, 0, 1, epochs=2, seed=1)
    assert not np.array_equal(order.global_batch(0), order.global_batch(1))
    assert MicrobatchOrder(5, 1, 2, 0, 1).global_batch(1).tolist() == [2, 3]
