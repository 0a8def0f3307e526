"""Low-rank adapters in the real trainer: same results with any layout, recompute or resuming; exports load."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.support import reference
from tests.support.training import STEPS, assert_same, records, run, run_and_kill
from treg_megatron.config.schema import LoraSection
from treg_megatron.errors import UserError

LORA = ["lora.rank=4", "lora.alpha=16", "optimizer.lr=1e-2", "train.save_every=7"]
LAYOUTS = {
    "one rank": (1, []),
    "recompute": (1, ["train.recompute=full"]),
    "TP2+SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP2": (2, ["parallel.pipeline=2"]),
    "DP2": (2, []),
}


@pytest.fixture(scope="module")
def single(tied_run, tmp_path_factory) -> Path:
    return run(tied_run, tmp_path_factory.mktemp("lora") / "out", 1, *LORA)


@pytest.fixture(scope="module")
def killed(tied_run, tmp_path_factory) -> Path:
    """A run on one rank that was killed at step 8; its last checkpoint is from step 7."""
    out = tmp_path_factory.mktemp("killed") / "out"
    run_and_kill(tied_run, out, 1, 8, *LORA)
    return out


def test_only_adapters_are_trained_and_saved(tied_run, single):
    from treg_megatron.checkpoint.layout import WEIGHTS, newest_checkpoint
    from treg_megatron.checkpoint.torch_dist import TorchDistReader

    losses = [r["loss"] for r in records(single)]
    assert losses[-1] < 0.25 < losses[0]
    saved = TorchDistReader(newest_checkpoint(single) / WEIGHTS).tensors
    assert saved and all(".adapter." in key for key in saved)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_resumes_a_killed_run(layout, tied_run, single, killed, tmp_path):
    size, overrides = LAYOUTS[layout]
    out = tmp_path / "out"
    shutil.copytree(killed, out)
    run(tied_run, out, size, *LORA, *overrides)
    assert "resuming from step_000007" in out.with_suffix(".log.0").read_text()
    found, expected = records(out), records(single)
    assert len(found) == STEPS
    assert_same([r["loss"] for r in found], [r["loss"] for r in expected], rtol=1e-5)
    if layout == "one rank":
        assert [r["loss"] for r in found] == [r["loss"] for r in expected]


def test_exports_equal_the_trained_policy(tied_run, single, tmp_path):
    """Merged weights and peft's model give the margins that the run reported for the held-out pairs at its end."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from treg_megatron.checkpoint.to_hf import export_adapter, export_checkpoint
    from treg_megatron.config.recipe import load_recipe, section
    from treg_megatron.data.streams import open_streams

    export_checkpoint(single, tied_run.hf, tmp_path / "merged")
    export_adapter(single, tied_run.hf, tmp_path / "adapter")
    recipe = load_recipe(tied_run.recipe, tied_run.overrides)
    beta, streams = section(recipe, "objective").beta, open_streams(section(recipe, "data").validation)
    expected = records(single, validation=True)[-1]["validation/rewards/margins"]
    base = AutoModelForCausalLM.from_pretrained(tied_run.hf)
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"),
        PeftModel.from_pretrained(base, tmp_path / "adapter"),
    ):
        margin = reference.mean_margin(model, (streams[i] for i in range(len(streams))), beta)
        assert margin == pytest.approx(expected, rel=1e-4)
    assert abs(expected) > 0.5


def test_a_checkpoint_without_adapters_cannot_be_exported_as_adapter(tied_run, tmp_path):
    from treg_megatron.checkpoint.to_hf import export_adapter

    with pytest.raises(UserError, match="has no adapters: every weight was trained"):
        export_adapter(Path(tied_run.hf).parent / "megatron", tied_run.hf, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "changes, fields, message",
    [
        (dict(rank=0), {}, "rank is at least 1"),
        (dict(targets=["q_proj"]), {}, "lora.targets names q_proj; choose among linear_qkv"),
        (dict(targets=[]), {}, "lora.targets names nothing"),
        ({}, {"num_moe_experts": 4}, "experts get no adapters"),
        ({}, {"post_layer_norms": True}, "could not be merged"),
    ],
)
def test_invalid_adapter_settings_are_refused(changes, fields, message):
    from treg_megatron.models.lora import adapters

    config = SimpleNamespace(**{"num_moe_experts": None} | fields)
    good = dict(rank=4, alpha=16.0, dropout=0.0, targets=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"])
    with pytest.raises(UserError, match=message):
        adapters(LoraSection(**good | changes), config)
