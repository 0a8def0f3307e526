"""Adapters on Transformer Engine's layers are those of PyTorch's, so that either loads and exports the other's."""

import pytest

from tests.engine.test_layers import ENGINE
from tests.support.engine_ranks import adapted
from tests.support.forked import run_ranks

ATTENTION, MLP = ["linear_qkv", "linear_proj"], ["linear_fc1", "linear_fc2"]

TARGETS = {"Mixtral": ATTENTION, "Qwen3Moe": ATTENTION, "Gemma2": ["linear_qkv", "linear_fc1"]}


def check(family, checkpoints, tensor, precision, classes):
    targets = TARGETS.get(family, [*ATTENTION, *MLP])
    for engine, plain in run_ranks(tensor, adapted, checkpoints[family], tensor, targets, precision):
        assert {name.rpartition(".")[2] for name in engine.wrapped} == set(targets)
        assert len(engine.wrapped) == 4 * len(targets)  # layers
        assert set(engine.wrapped.values()) <= classes
        assert engine.frozen and plain.frozen
        assert engine._replace(wrapped={}) == plain._replace(wrapped={})


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("family", ENGINE)
def test_adapters_on_the_engines_layers(family, tensor, checkpoints):
    check(family, checkpoints, tensor, "bf16", {"TELayerNormColumnParallelLinear", "TERowParallelLinear"})


@pytest.mark.parametrize("family, precision", [("Llama", "fp32"), ("Gemma2", "bf16")])
def test_adapters_on_plain_layers_beside_the_engine(family, precision, checkpoints):
    plain = {"ColumnParallelLinear", "RowParallelLinear", "ColumnParallelLinearIn", "RowParallelLinearIn"}
    check(family, checkpoints, 2, precision, plain)
