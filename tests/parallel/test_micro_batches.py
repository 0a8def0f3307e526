"""Micro-batches in flight, and what makes the host wait during them."""

import warnings

import torch
from megatron.core.pipeline_parallel import schedules

from tests.support.forked import run_ranks
from tests.support.training import RECIPE, train_on_this_rank
from treg_megatron.accept.steps import SYNC_WARNING, Waits
from treg_megatron.distributed.micro_batches import watch_micro_batches
from treg_megatron.models import policy


def in_flight_while(function, *args) -> list[int]:
    seen = []
    watch_micro_batches(seen.append)
    function(*args)
    return seen


def test_the_first_of_two_stages_has_two_in_flight(tied_run, tmp_path):
    overrides = tied_run.sections(tmp_path / "out", "train.max_steps=1", "data.validation=null", "parallel.pipeline=2")
    first, last = run_ranks(2, in_flight_while, train_on_this_rank, RECIPE, overrides, log=tmp_path / "log")
    assert last == [1, 0] * 4 and first == [1, *[2, 1] * 3, 0]


def test_nothing_is_in_flight_after_validation_or_an_error(tied_run, tmp_path):
    overrides = tied_run.sections(tmp_path / "out", "train.max_steps=1")
    (seen,) = run_ranks(1, in_flight_while, train_on_this_rank, RECIPE, overrides, log=tmp_path / "log")
    assert seen == [1, 0] * (len(seen) // 2) and len(seen) > 8
    assert run_ranks(1, in_flight_while_it_fails) == [[1, 0]]


def in_flight_while_it_fails() -> list[int]:
    def fails():
        raise ValueError

    schedules.forward_step = fails
    seen = []
    watch_micro_batches(seen.append)
    try:
        schedules.forward_step()
    except ValueError:
        return seen
    return []


def counted_on_a_gpu(overrides: list[str]) -> tuple[dict[str, float], list[str]]:
    """Waits per micro-batch of a training in which torch warns of one in every loss, and the modes that were set."""
    modes, loss = [], policy.preference_loss

    def loss_that_waits(*args):
        if modes[-1] == "warn":
            warnings.warn(SYNC_WARNING, stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return loss(*args)

    torch.cuda.set_sync_debug_mode = modes.append
    torch.cuda.is_available, available = lambda: True, torch.cuda.is_available
    waits = Waits()
    torch.cuda.is_available = available
    policy.preference_loss = loss_that_waits
    train_on_this_rank(RECIPE, overrides)
    return waits.per_micro_batch(), modes


def test_torchs_sync_debug_mode_is_on_during_micro_batches_alone(tied_run, tmp_path):
    overrides = tied_run.sections(tmp_path / "out", "train.max_steps=2", "data.validation=null")
    ((waits, modes),) = run_ranks(1, counted_on_a_gpu, overrides, log=tmp_path / "log")
    ((place, count),) = waits.items()
    assert place.startswith(__file__) and count == 1
    assert modes == ["warn", "default"] * (len(modes) // 2) and len(modes) == 16
