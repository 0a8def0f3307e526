"""What the recipe's keys for overlapped communication stand for, and which combinations are refused."""

from pathlib import Path

import pytest

from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.distributed.layout import (
    data_overlap,
    require_overlap,
    require_tensor_overlap,
    rows_of_one_length,
)
from treg_megatron.errors import UserError

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny.yaml"


def parallel(*overrides: str):
    return section(load_recipe(TINY, [f"parallel.{each}" for each in overrides]), "parallel")


def layout(name: str):
    return section(load_recipe(TINY, ["label.pairs=unused", "model.hf=unused", f"data.layout={name}"]), "data")


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


TENSOR_OVERLAP = ("tensor=2", "sequence=true", "tensor_overlap=true")


def test_tensor_parallel_overlap_is_off_unless_asked_for():
    assert not parallel("tensor=2", "sequence=true").tensor_overlap
    require_tensor_overlap(parallel(), layout("padded"))


@pytest.mark.slow
def test_tensor_parallel_overlap_takes_rows_of_one_length():
    require_tensor_overlap(parallel(*TENSOR_OVERLAP), layout("bins"))
    assert rows_of_one_length(parallel(*TENSOR_OVERLAP))
    assert rows_of_one_length(parallel("pipeline=2", "virtual_pipeline=2")) and not rows_of_one_length(parallel())
    for name in ("packed", "padded"):
        with pytest.raises(
            UserError, match=rf"^parallel\.tensor_overlap needs rows of .* data\.layout=bins, not {name}$"
        ):
            require_tensor_overlap(parallel(*TENSOR_OVERLAP), layout(name))


def test_tensor_parallel_overlap_needs_sequence_parallelism():
    with pytest.raises(UserError, match=r"^parallel\.tensor_overlap overlaps .* it needs parallel\.sequence=true$"):
        require_tensor_overlap(parallel("tensor=2", "tensor_overlap=true"), layout("bins"))
