"""Transformer Engine's layers of every architecture against the map of parameters and the plain PyTorch layers."""

import re
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import config_of
from tests.support.engine_ranks import Described, load_and_describe, make_overlap_buffers, overlapping_layers
from tests.support.forked import run_ranks
from tests.support.tiny_families import SPECIAL
from treg_megatron.checkpoint.layout import MODEL_PREFIX
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.models.families import (
    checkpoint_key,
    family_of,
    model_fields,
    name_at,
    parameter_shape,
    stacked_indices,
    stacked_shape,
)
from treg_megatron.utils.substitute import substituted

#: Gemma 2 and 3 take plain PyTorch layers everywhere
ENGINE = tuple(family for family in SPECIAL if not family.startswith("Gemma"))
Both = tuple[Described, Described]


@pytest.fixture(scope="module")
def alone(checkpoints) -> dict[str, Both]:
    return {family: run_ranks(1, load_and_describe, checkpoints[family], 1)[0] for family in SPECIAL}


@pytest.fixture(scope="module")
def split(checkpoints) -> dict[str, list[Both]]:
    return {family: run_ranks(2, load_and_describe, checkpoints[family], 2) for family in SPECIAL}


def names_of(checkpoint: Path, engine: bool) -> dict[str, tuple[int, ...]]:
    """Parameter -> shape on one rank, by the map."""
    config = config_of(checkpoint.parent / "hf")
    fields = model_fields(config)
    names = {
        name_at(p.name if engine else p.local_name or p.name, index): parameter_shape(p, fields)
        for p in family_of(config).parameters(fields)
        for index in stacked_indices(p.name, fields)
    }
    if engine and config["architectures"] == ["Qwen3MoeForCausalLM"]:
        return {re.sub(r"local_experts\.(\d+)\.(\w+)\.weight", r"\2.weight\1", name): s for name, s in names.items()}
    return names


@pytest.mark.parametrize("family", SPECIAL)
def test_the_layers_are_those_that_training_takes(family, alone):
    engine, plain = alone[family]
    assert any("TEDotProductAttention" in name for name in engine.classes) == (family in ENGINE)
    assert any("transformer_engine" in name for name in engine.classes) == (family in ENGINE)
    assert not any("transformer_engine" in name for name in plain.classes)


@pytest.mark.parametrize("family", SPECIAL)
def test_names_and_shapes_are_those_of_the_map(family, alone, checkpoints):
    for layers, engine in zip(alone[family], (family in ENGINE, False), strict=True):
        found = {name: tuple(parameter.shape) for name, parameter in layers.parameters.items()}
        assert found == names_of(checkpoints[family], engine)


@pytest.mark.parametrize("family", SPECIAL)
def test_keys_and_shapes_in_a_checkpoint_are_those_of_the_map(family, alone, checkpoints):
    config = config_of(checkpoints[family].parent / "hf")
    fields = model_fields(config)
    expected = {MODEL_PREFIX + p.key: stacked_shape(p, fields) for p in family_of(config).parameters(fields)}
    for layers in alone[family]:
        assert layers.keys == expected


@pytest.mark.parametrize("family", SPECIAL)
def test_imports_hold_every_extra_state_that_the_layers_load(family, alone, checkpoints):
    engine, _ = alone[family]
    modules = family_of(config_of(checkpoints[family].parent / "hf")).extra_state_modules()
    assert engine.extra_states <= {f"{MODEL_PREFIX}{checkpoint_key(module)}._extra_state" for module in modules}
    assert engine.extra_states  # FP8 scales, empty in other precisions


@pytest.mark.parametrize("family", SPECIAL)
@pytest.mark.parametrize("tensor", [1, 2])
def test_an_import_loads_with_the_same_values(family, tensor, alone, split, checkpoints):
    """Bit for bit what the plain PyTorch layers load, on every tensor-parallel rank."""
    to_plain = dict(zip(names_of(checkpoints[family], family in ENGINE), names_of(checkpoints[family], False)))
    for engine, plain in [alone[family]] if tensor == 1 else split[family]:
        assert {to_plain[name] for name in engine.parameters} == plain.parameters.keys()
        for name, parameter in engine.parameters.items():
            assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, plain.parameters[to_plain[name]]), name


@pytest.mark.parametrize("family", SPECIAL)
def test_gradients_are_reduced_alike(family, split, checkpoints):
    """Megatron reads off each parameter whether tensor-parallel ranks split it, or each sees a part of its tokens."""
    to_plain = dict(zip(names_of(checkpoints[family], family in ENGINE), names_of(checkpoints[family], False)))
    for engine, plain in split[family]:
        assert {to_plain[name]: marks for name, marks in engine.marks.items()} == plain.marks
        assert all(marks["sequence_parallel"] for name, marks in plain.marks.items() if "norm" in name)


@pytest.mark.parametrize("family", ENGINE)
def test_windows_are_those_of_the_model(family, alone):
    """transformers counts the token itself; Qwen 2's window begins in the layer that config.json names."""
    every, sliding = (-1, 0), (SPECIAL["Mistral"]["sliding_window"] - 1, 0)
    expected = {"Qwen2": [every] * 3 + [sliding]} | dict.fromkeys(("Mistral", "Qwen3Moe", "Phi3"), [sliding] * 4)
    expected = expected.get(family, [every] * 4)
    assert alone[family][0].windows == expected


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("family", SPECIAL)
def test_rotary_embedding_waits_for_no_gpu(family, precision, checkpoints):
    """Megatron's own reads the lengths of a packed row in every layer; the plain layers have another."""
    from treg_megatron.models import build

    recipe = load_recipe(overrides=[f"train.precision={precision}"])
    config = config_of(checkpoints[family].parent / "hf")
    with substituted(build, "is_cpu", lambda: False):
        found = build.policy_config(config, section(recipe, "parallel"), section(recipe, "train"))
    assert found.apply_rope_fusion == (not found.torch_layers) == (family in ENGINE and precision == "bf16")


@pytest.mark.parametrize("family", SPECIAL)
def test_preflight_counts_the_same_parameters(family, alone, split, checkpoints):
    """Preflight builds the plain layers, and speaks of the engine's."""
    total = sum(torch.Size(shape).numel() for shape in names_of(checkpoints[family], False).values())
    for engine, plain in [alone[family], *split[family]]:
        assert engine.count == plain.count == (total, 0)


def test_tensor_parallel_communication_overlaps_in_every_buffer(checkpoints):
    gather, scatter = (True, False), (False, True)
    expected = {"qkv": gather, "proj": scatter, "fc1": gather, "fc2": scatter}
    assert run_ranks(2, overlapping_layers, checkpoints["Llama"]) == [expected] * 2


def test_the_call_that_makes_the_buffers_reaches_what_is_compiled():
    for found in run_ranks(2, make_overlap_buffers):
        assert "device_supports_multicast" in found
