"""Data-parallel communication during the forward and the backward pass: the same training, bit for bit.

Megatron's buckets hold 40 million parameters; here they hold so few that every layer has its own.
"""

import functools
from pathlib import Path

import pytest
import torch

from tests.support.training import records, run
from treg_megatron.checkpoint.layout import WEIGHTS, newest_checkpoint
from treg_megatron.checkpoint.torch_dist import TorchDistReader
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.errors import UserError
from treg_megatron.utils.files import read_json

OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
# without clipping: the norm is a sum over a rank's shard of each bucket, whose order the buckets decide
SAME = ["optimizer.clip_grad=0", "optimizer.lr=1e-3", "train.max_steps=6", "train.save_every=6"]
BUCKET = 5000
LAYOUTS = {
    "DP2": (2, []),
    "DP2xTP2+SP": (4, ["parallel.tensor=2", "parallel.sequence=true"]),
    "DP2 with adapters": (2, ["lora.rank=4"]),
    "CP2 recompute": (2, ["parallel.context=2", "train.recompute=full"]),
    "DP2xPP2+VPP2": (
        4,
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "data.layout=bins", "data.bin_size=180"],
    ),
}


@pytest.fixture
def small_buckets(monkeypatch):
    from treg_megatron.training import build

    config = build.DistributedDataParallelConfig
    monkeypatch.setattr(build, "DistributedDataParallelConfig", functools.partial(config, bucket_size=BUCKET))


TENSOR_OVERLAP = [
    *("parallel.tensor=2", "parallel.sequence=true", "parallel.tensor_overlap=true"),
    *("data.layout=bins", "data.bin_size=180", "train.precision=bf16"),
]


def planned(files, *overrides: str):
    """The policy's config of a tiny run, and the sections that it was made of."""
    from treg_megatron.models.build import policy_config

    recipe = load_recipe(files.recipe, [*files.overrides, *overrides])
    sections = [section(recipe, name) for name in ("data", "parallel", "train")]
    return policy_config(read_json(files.hf / "config.json"), *sections[1:]), *sections


def test_tensor_overlap_is_configured(tied_run, monkeypatch):
    from treg_megatron.data.streams import open_streams
    from treg_megatron.models import build
    from treg_megatron.training.data_module import PairData

    config, data, parallel, _ = planned(tied_run, *TENSOR_OVERLAP)
    assert not config.tp_comm_overlap, "these layers have none"
    with pytest.raises(UserError, match="^parallel.tensor_overlap needs .*, and it is not installed: set it to false$"):
        build.require_overlapping_layers(config, parallel)
    monkeypatch.setattr(build.policies, "HAVE_TE", True)
    config, data, parallel, _ = planned(tied_run, *TENSOR_OVERLAP)
    build.require_overlapping_layers(config, parallel)
    assert config.tp_comm_overlap
    assert PairData(data, open_streams(data.train), None, parallel).pad_to == 184, "the bin, rounded up"
    config, _, parallel, _ = planned(tied_run, *TENSOR_OVERLAP, "train.precision=fp32")
    with pytest.raises(UserError, match="fp32 and Gemma take PyTorch's: set it to false$"):
        build.require_overlapping_layers(config, parallel)
    assert not planned(tied_run, *TENSOR_OVERLAP, "parallel.tensor_overlap=false")[0].tp_comm_overlap


def test_a_run_without_transformer_engine_refuses_tensor_overlap(tied_run, tmp_path):
    with pytest.raises(AssertionError, match="tensor_overlap needs Transformer Engine's layers"):
        run(tied_run, tmp_path / "out", 2, *TENSOR_OVERLAP, "train.max_steps=1")


def weights(output: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint: weights, main parameters and Adam's moments."""
    newest = newest_checkpoint(output)
    assert newest.name == "step_000006"
    reader, found = TorchDistReader(newest / WEIGHTS), {}
    for key, entry in reader.tensors.items():
        found[key] = torch.empty(entry.size, dtype=entry.properties.dtype)
        reader.read_into(key, found[key])
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_overlap_trains_the_same(layout, untied_run, small_buckets, tmp_path):
    size, overrides = LAYOUTS[layout]
    plain = run(untied_run, tmp_path / "plain", size, *SAME, *overrides)
    overlapped = run(untied_run, tmp_path / "overlapped", size, *SAME, *overrides, *OVERLAP)
    for validation in (False, True):
        name = "validation/loss" if validation else "loss"
        found, expected = ([r[name] for r in records(out, validation)] for out in (overlapped, plain))
        assert found == expected and len(found) > 1
    ours, theirs = weights(overlapped), weights(plain)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
