"""What the recipe's keys for overlapped communication stand for, and which combinations are refused."""

from pathlib import Path

import pytest

from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.distributed.layout import data_overlap, require_overlap
from treg_megatron.errors import UserError

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny.yaml"


def parallel(*overrides: str):
    return section(load_recipe(TINY, [f"parallel.{each}" for each in overrides]), "parallel")


@pytest.mark.parametrize(
    "overrides, on_cpu, on_gpu",
    [
        ([], (False, False), (True, True)),
        (["overlap_grad_reduce=true"], (True, True), (True, True)),
        (["overlap_grad_reduce=false"], (False, False), (False, False)),
        (["overlap_param_gather=true"], (True, True), (True, True)),
        (["overlap_param_gather=false"], (False, False), (True, False)),
    ],
)
def test_null_is_on_where_there_are_gpus(overrides, on_cpu, on_gpu):
    keys = parallel(*overrides)
    require_overlap(keys)
    assert (data_overlap(keys, on_gpu=False), data_overlap(keys, on_gpu=True)) == (on_cpu, on_gpu)


def test_weights_are_gathered_in_the_buckets_of_the_gradients():
    with pytest.raises(UserError, match=r"^parallel\.overlap_param_gather gathers .* set both to true, or neither$"):
        require_overlap(parallel("overlap_grad_reduce=false", "overlap_param_gather=true"))
