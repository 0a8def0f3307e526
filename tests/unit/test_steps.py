"""Time of a step by formula: bubble, arithmetic of adapters, GPUs and their utilisation."""

import dataclasses
from pathlib import Path

import pytest

from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.errors import UserError
from treg_megatron.models.families import model_fields
from treg_megatron.preflight import costs, gpus, steps
from treg_megatron.utils.files import read_json

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ARCHITECTURES = RECIPES.parent / "treg_megatron" / "models" / "architectures"


def sections(*overrides: str):
    recipe = load_recipe(RECIPES / "tiny.yaml", ["data.layout=bins", "data.global_batch_size=128", *overrides])
    return section(recipe, "parallel"), section(recipe, "data")


@pytest.mark.parametrize(
    "overrides, data_ranks, fill, micro_batches, bubble",
    [
        (["parallel.pipeline=4"], 2, 1.0, 64, 3 / 67),
        (["parallel.pipeline=4", "parallel.virtual_pipeline=5"], 2, 1.0, 64, 0.6 / 64.6),
        # 36 slots for 32 micro-batches: groups of nine
        (["parallel.pipeline=9", "parallel.virtual_pipeline=7"], 4, 1.0, 36, 1 - 32 / (36 + 8 / 7)),
        # 43 bins of three pairs: 22 on the fuller of two ranks, in groups of four
        (["parallel.pipeline=4", "parallel.virtual_pipeline=5"], 2, 1 / 3, 24, 1 - 21.5 / 24.6),
        (["parallel.pipeline=4", "data.layout=packed", "data.micro_batch_size=2"], 4, 1 / 3, 16, 3 / 19),
        ([], 8, 1.0, 16, 0.0),
    ],
)
def test_bubble_by_hand(overrides, data_ranks, fill, micro_batches, bubble):
    parallel, data = sections(*overrides)
    assert steps.micro_batches(parallel, data, data_ranks, fill) == micro_batches
    assert steps.bubble(parallel, data, data_ranks, fill) == pytest.approx(bubble)


def test_frozen_weights_have_no_gradient_and_recompute_repeats_the_layers():
    fields = model_fields(read_json(ARCHITECTURES / "llama3_8b.json"))
    _, data = sections("data.seq_length=2048")
    work = costs.forward_flops(fields, 2048, 1024)
    sequences = 2 * data.global_batch_size
    assert costs.step_flops(fields, data) == pytest.approx(3 * sequences * work.total)
    assert costs.step_flops(fields, data, adapters=True) == pytest.approx(
        sequences * (2 * (work.layers + work.head) + 3 * work.attention)
    )
    again = costs.step_flops(fields, data, recompute_layers=True) - costs.step_flops(fields, data)
    assert again == pytest.approx(sequences * (work.layers + work.attention))


def cluster(*overrides: str):
    return gpus.with_gpu(section(load_recipe(RECIPES / "llama3_8b.yaml", list(overrides)), "cluster"))


def test_a_gpu_gives_what_the_recipe_leaves_open():
    assert cluster().gpu_memory == 80 and cluster().peak_tflops == 989
    other = cluster("cluster.gpu=b200", "cluster.gpu_memory=170")
    assert (other.gpu_memory, other.peak_tflops, other.node_bandwidth) == (170, 2250, 900)
    with pytest.raises(UserError, match="cluster.gpu_memory has no value: set it, or name cluster.gpu"):
        cluster("cluster.gpu=null")
    with pytest.raises(UserError, match="cluster.gpu is 'h1000'; choose one of h100, h200"):
        cluster("cluster.gpu=h1000")


def test_every_gpu_of_the_schema_is_known():
    choices = next(f for f in dataclasses.fields(type(cluster())) if f.name == "gpu").metadata["choices"]
    assert set(choices) == set(gpus.GPUS)
    assert {name.split("_")[0] for name in gpus.GPUS} == set(gpus.DENSE)


@pytest.mark.parametrize(
    "overrides, parameters, share, source",
    [
        ([], 8e9, 0.46, "llm-foundry"),
        ([], 70e9, 0.51, "DGX Cloud"),
        (["cluster.gpu=a100_40"], 8e9, 0.64, "llm-foundry"),
        (["cluster.gpu=h200"], 8e9, 0.46, "assumption"),
        (["cluster.mfu=0.3"], 8e9, 0.3, "cluster.mfu"),
        (["cluster.device=cpu"], 8e9, 0.4, "assumption"),
    ],
)
def test_utilisation_is_measured_or_given(overrides, parameters, share, source):
    found = gpus.utilisation(cluster(*overrides), {}, parameters)
    assert found.share == share and source in found.measured


def test_experts_reach_less():
    assert gpus.utilisation(cluster(), {"num_moe_experts": 8}, 47e9).share == 0.28
