"""Every recipe on its stated cluster (`make test-recipes`); `make test` has a sample."""

import pytest

from tests.support.forked import run_ranks
from tests.support.preflights import preflight
from tests.support.published import PUBLISHED
from treg_megatron.config import recipe_table

ROWS = {row.recipe: row for row in recipe_table.read()}


def row_in_this_process(name: str):
    from treg_megatron.preflight import table

    return table.row(name)


@pytest.mark.parametrize("name", ROWS)
def test_a_recipe_fits_its_stated_cluster(name):
    done = preflight(name)
    assert done.code == 0 and "verdict: fits" in done.printed, done.printed
    assert "TOO MUCH" not in done.printed, "the reference model must fit, too"
    if not name.endswith("_lora"):
        assert f"{PUBLISHED[name]:,} parameters, all trained" in done.printed
    assert done.cpu_seconds < 60 and done.grown_gb < 2


@pytest.mark.parametrize("name", ROWS)
def test_the_table_is_what_preflight_says_now(name):
    assert run_ranks(1, row_in_this_process, name)[0] == ROWS[name], "make recipes-table"
