"""`treg recipe new` for every published configuration on four clusters (`make test-recipes`): a recipe that preflight
passes, or the reason why there is none."""

import re

import pytest

from tests.support.new_recipes import new_recipe
from tests.support.preflights import preflight
from treg_megatron.models.architecture import PUBLISHED

CLUSTERS = {
    "1x8x80": ["--nodes", "1"],
    "2x8x80": ["--nodes", "2"],
    "4x8x80": ["--nodes", "4"],
    "1x4x40": ["--nodes", "1", "--gpus-per-node", "4", "--gpu", "a100_40"],
}
NAMES = sorted(path.stem for path in PUBLISHED.glob("*.json"))


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_that_preflight_passes_or_a_reason(name, cluster, tmp_path):
    path = tmp_path / "mine.yaml"
    made = new_recipe("--config", name, *CLUSTERS[cluster], "--output", str(path))
    if made.error:
        assert re.search(r"does not fit .*: .*(fits has \d+|nor does it fit \d+ such nodes)$", made.error), made.error
        assert "\n" not in made.error and not path.exists()
        return
    done = preflight(path)
    assert done.code == 0, done.printed
    assert made.cpu_seconds < 60
