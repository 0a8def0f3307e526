"""Adam on the host for a part of the parameters: the same training, also when it is resumed, with or without.

They run with device labels, because only the device distinguishes the host's parameters from the GPU's.
"""

from pathlib import Path

import pytest
import torch
from megatron.core.optimizer import distrib_optimizer

from tests.support.forked import run_ranks
from tests.support.training import RECIPE, TinyRun, records, train_on_this_rank
from treg_megatron.distributed import device_labels
from treg_megatron.errors import UserError
from treg_megatron.training import build, offload

SAME_RATE = ["optimizer.lr=1e-3", "optimizer.min_lr=1e-3", "optimizer.warmup_fraction=0"]
BF16 = ["train.precision=bf16", "train.first_loss_tolerance=0.1"]


def labelled(engine: bool, function, *args) -> set[tuple[bool, bool]]:
    """Train with labels on; whether parameters and moments that were updated are on the GPU.

    Args:
        engine: Megatron takes its paths of a machine with Transformer Engine.
    """
    device_labels.install()
    distrib_optimizer.HAVE_APEX_OR_TE = engine
    step, places = offload.OffloadedAdam.step, set()

    def watched(self, *args):
        result = step(self, *args)
        for optimizer in self.sub_optimizers:
            places.update((p.is_cuda, state["exp_avg"].is_cuda) for p, state in optimizer.state.items())
        return result

    offload.OffloadedAdam.step = watched
    function(*args)
    return places


def train(files: TinyRun, output: Path, steps: int, fraction: float, *overrides: str, engine: bool = False):
    """Losses of a training on two ranks, and the places of what its last part updated."""
    overrides = files.sections(
        output, "data.epochs=4", f"train.max_steps={steps}", f"optimizer.offload={fraction}", *SAME_RATE, *overrides
    )
    places = run_ranks(2, labelled, engine, train_on_this_rank, RECIPE, overrides, log=output.with_suffix(".log"))
    return [record["loss"] for record in records(output)], places[0]


HOST, GPU = (False, False), (True, True)


@pytest.fixture(scope="module")
def plain(tied_run, tmp_path_factory) -> list[float]:
    return train(tied_run, tmp_path_factory.mktemp("plain") / "out", 6, 0)[0]


@pytest.mark.parametrize("fraction, where", [(0.5, {HOST, GPU}), (1, {HOST})])
def test_training_and_resuming_are_the_same(fraction, where, tied_run, plain, tmp_path):
    whole, places = train(tied_run, tmp_path / "whole", 6, fraction)
    assert whole == pytest.approx(plain, rel=1e-5) and places == where
    train(tied_run, tmp_path / "cut", 3, fraction)
    assert train(tied_run, tmp_path / "cut", 6, fraction) == (whole, where)


def test_a_checkpoint_resumes_with_and_without(tied_run, plain, tmp_path):
    for name, first, then in (("begun", 1, 0), ("ended", 0, 0.5)):
        train(tied_run, tmp_path / name, 3, first)
        assert train(tied_run, tmp_path / name, 6, then)[0] == pytest.approx(plain, rel=1e-5), name


def test_bf16_where_transformer_engine_is_installed(tied_run, tmp_path):
    plain, _ = train(tied_run, tmp_path / "plain", 6, 0, *BF16)
    whole, places = train(tied_run, tmp_path / "whole", 6, 0.5, *BF16, engine=True)
    assert whole == pytest.approx(plain, rel=1e-2) and places == {HOST, GPU}
    train(tied_run, tmp_path / "cut", 3, 0.5, *BF16, engine=True)
    assert train(tied_run, tmp_path / "cut", 6, 0.5, *BF16, engine=True)[0] == whole


def test_what_is_refused():
    config = build.OptimizerConfig(optimizer="adam")
    with pytest.raises(UserError, match=r"^optimizer.offload=1.5 is the fraction .*: 0 to 1$"):
        offload.offload(config, 1.5)
    with pytest.raises(UserError, match=r"^optimizer.offload moves .* from a GPU to its host: set it to 0"):
        offload.offload(config, 0.5)
    offload.offload(config, 0)
    assert not config.optimizer_cpu_offload and not torch.cuda.is_available()
