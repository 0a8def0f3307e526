"""The compact string set behaves like a set."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treg_megatron.utils import string_set as seen
from treg_megatron.utils.string_set import StringSet


@pytest.fixture(autouse=True, scope="module")
def few():
    """Make texts move to the sorted part early."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seen, "_FEW", 4)
        yield


@given(texts=st.lists(st.text(max_size=3), max_size=60))
def test_seen_is_a_set(texts):
    known, expected = StringSet(), set()
    for text in texts:
        assert (text in known) == (text in expected)
        if text not in known:
            known.add(text)
            expected.add(text)
        assert len(known) == len(expected)
    assert all(text in known for text in expected)
