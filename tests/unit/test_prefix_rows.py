"""Rows in which shared prefixes are stored once, and where sorted sequences are cut into rows."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treg_megatron.data.prefixes import prefix_row
from treg_megatron.labelling.scoring import shared_prefixes
from treg_megatron.labelling.scoring.shared_prefixes import in_order, portions, shared_lengths


@st.composite
def related(draw) -> list[np.ndarray]:
    """Sequences of two kinds of token, which share much."""
    lists = draw(st.lists(st.lists(st.integers(1, 2), min_size=1, max_size=12), min_size=1, max_size=7))
    return [np.array(tokens) for tokens in lists]


@given(sequences=related())
def test_a_span_and_its_prefix_are_the_sequence_up_to_there(sequences):
    ordered = [sequences[i] for i in in_order(sequences)]
    shared = [0, *(len(common(*pair)) for pair in itertools.pairwise(ordered))]
    row = prefix_row(ordered, shared)
    starts = np.cumsum([0, *(span.tokens for span in row.spans)])
    assert starts[-1] == len(row.tokens) == sum(map(len, ordered)) - sum(shared)
    for sequence, place in zip(ordered, row.places, strict=True):
        assert row.tokens[place].tolist() == sequence.tolist()
        assert row.positions[place].tolist() == list(range(len(sequence)))
    own = [np.arange(start, start + span.tokens) for start, span in zip(starts, row.spans)]
    adding = [place for place, sequence, n in zip(row.places, ordered, shared, strict=True) if n < len(sequence)]
    for span, mine, place in zip(row.spans, own, adding, strict=True):
        assert [*itertools.chain(*(own[i][:n] for i, n in span.prefix)), *mine] == place.tolist()


def common(first: np.ndarray, second: np.ndarray) -> list[int]:
    return [a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second))]


@pytest.mark.parametrize("share", [True, False])
@given(sequences=related(), budget=st.integers(1, 40))
def test_rows_fit_and_no_other_cuts_compute_less(sequences, budget, share):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_prefixes, "_WORTH_SHARING", 1)
        patch.setattr(shared_prefixes, "_PASS", 0)
        order = in_order(sequences)
        rows = list(portions(sequences, budget, share))
        assert [i for row in rows for i in row] == order

        def computed(row):
            members = [sequences[i] for i in row]
            return sum(map(len, members)) - (sum(shared_lengths(members)) if share else 0)

        def fits(row):
            return len(row) == 1 or computed(row) <= budget

        assert all(map(fits, rows))
        every = range(1, len(order))
        cuts = itertools.chain.from_iterable(itertools.combinations(every, n) for n in range(len(order)))
        ways = ([order[a:b] for a, b in itertools.pairwise([0, *cut, len(order)])] for cut in cuts)
        assert sum(map(computed, rows)) == min(sum(map(computed, way)) for way in ways if all(map(fits, way)))


def test_without_sharing_or_sequences():
    assert list(portions([], 10)) == []
    assert [len(row) for row in portions([np.arange(4)] * 5, 10, share=False)] == [1, 2, 2]


def test_families_stay_together_even_if_more_would_fit():
    """A row of three has as many tokens as the budget, from either end, but would cut a family."""
    families = [np.array([kind] * 20 + [end]) for kind in (1, 2) for end in (1, 2)]
    assert list(portions(families, 43)) == [[0, 1], [2, 3]]
    assert list(portions(families, 44)) == [[0, 1, 2, 3]]
