"""Checkpoints written without Transformer Engine are loaded with it, and the reverse.

Its modules have one state more than plain PyTorch's: ``_extra_state``. Here the norms get one.
"""

from pathlib import Path

import pytest
import torch

from tests.support.forked import run_ranks
from tests.support.training import records, train_on_this_rank


def with_extra_states() -> None:
    """From here on, norms of this process have an extra state."""
    from treg_megatron.kernels.rms_norm import RMSNorm

    RMSNorm.get_extra_state = lambda self: torch.empty(0, dtype=torch.uint8)
    RMSNorm.set_extra_state = lambda self, state: None


def train(recipe: Path, overrides: list[str], extra: bool) -> None:
    if extra:
        with_extra_states()
    train_on_this_rank(recipe, overrides)


def train_and_resume(tied_run, folder: Path, first: bool, second: bool) -> Path:
    for extra, steps in ((first, 3), (second, 6)):
        keys = tied_run.sections(folder / "out", "data.epochs=4", f"train.max_steps={steps}", "train.save_every=3")
        run_ranks(1, train, tied_run.recipe, keys, extra, log=folder / "log")
    return folder / "out"


@pytest.fixture(scope="module")
def without(tied_run, tmp_path_factory) -> Path:
    return train_and_resume(tied_run, tmp_path_factory.mktemp("without"), False, False)


@pytest.mark.parametrize("first, second", [(False, True), (True, False)], ids=["then with", "then without"])
def test_a_run_resumes_with_other_extra_states(first, second, tied_run, without, tmp_path):
    out = train_and_resume(tied_run, tmp_path, first, second)
    assert [record["step"] for record in records(out)] == [1, 2, 3, 4, 5, 6]
    assert [record["loss"] for record in records(out)] == [record["loss"] for record in records(without)]


def load_in(checkpoint: Path, precision: str, extra: bool) -> tuple[dict[str, torch.Tensor], set, bool]:
    """The policy's parameters, the precisions in which they were loaded, and whether it was on its device before."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from treg_megatron.checkpoint.policy import load_policy

    if extra:
        with_extra_states()
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    load, dtypes, moved, order = dist_checkpointing.load, set(), torch.nn.Module.cuda, []

    def recording(wanted, *args, **kwargs):
        dtypes.update(entry.dtype for entry in wanted.values() if hasattr(entry, "dtype"))
        order.append("load")
        return load(wanted, *args, **kwargs)

    def cuda(self, *args, **kwargs):
        order.append("cuda")
        return moved(self, *args, **kwargs)

    dist_checkpointing.load, torch.nn.Module.cuda = recording, cuda
    policy = load_policy(checkpoint, precision=precision)
    return dict(policy.module.named_parameters()), dtypes, order == ["cuda", "load"]


@pytest.mark.parametrize("extra", [False, True], ids=["as saved", "with extra states"])
def test_a_policy_is_never_in_memory_in_another_precision(extra, tied_run):
    checkpoint = Path(tied_run.hf).parent / "megatron"
    [(in_fp32, dtypes, on_device)] = run_ranks(1, load_in, checkpoint, "fp32", extra)
    assert dtypes == {torch.float32} and on_device
    [(in_bf16, dtypes, on_device)] = run_ranks(1, load_in, checkpoint, "bf16", extra)
    assert dtypes == {torch.bfloat16} and on_device
    assert in_fp32.keys() == in_bf16.keys()
    assert all(torch.equal(in_bf16[name], weight.to(torch.bfloat16)) for name, weight in in_fp32.items())
