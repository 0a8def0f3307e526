"""Signals, heartbeats and background checkpoints on forked gloo ranks."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.forked import run_ranks
from tests.support.training import TinyRun, records, train_on_this_rank
from treg_megatron.data.sampler import recorded_pairs
from treg_megatron.training.callbacks.heartbeat import Watcher

OVERRIDES = ["data.epochs=4", "train.max_steps=20", "data.validation=null"]


def stopped_or_done(recipe: Path, overrides: list[str]) -> int:
    try:
        train_on_this_rank(recipe, overrides)
    except SystemExit as end:
        return end.code
    return 0


def run(files: TinyRun, output: Path, *overrides: str, meanwhile=None) -> list[int]:
    """Train on two ranks and return their exit codes."""
    return run_ranks(
        2,
        stopped_or_done,
        files.recipe,
        files.sections(output, *OVERRIDES, *overrides),
        log=output.with_suffix(".log"),
        meanwhile=meanwhile,
    )


def signal_rank(rank: int, number: int, output: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while not (output / "metrics.jsonl").exists() or f'"step": {step},' not in (output / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline, f"step {step} not reached"
        time.sleep(0.002)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    leaders = sorted(int(child) for child in children if os.getsid(int(child)) == int(child))
    os.kill(leaders[rank], number)


@pytest.mark.parametrize(
    "layout, number", [("parallel.pipeline=1", signal.SIGUSR1), ("parallel.pipeline=2", signal.SIGTERM)]
)
def test_a_signal_to_one_rank_stops_all_after_the_same_step(layout, number, tied_run, tmp_path):
    out = tmp_path / "out"
    overrides = [layout, "train.save_every=1000", "train.record_pairs=true"]
    assert run(tied_run, tmp_path / "uninterrupted", *overrides) == [0, 0]
    assert run(tied_run, out, *overrides, meanwhile=lambda: signal_rank(1, number, out, 3)) == [85, 85]
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert 3 <= int(checkpoint.name[-6:]) < 20
    assert (
        f"stopped by {signal.Signals(number).name}: step {int(checkpoint.name[-6:])} of 20"
        in out.with_suffix(".log.0").read_text()
    )
    assert run(tied_run, out, *overrides) == [0, 0]
    found, expected = (
        [{k: v for k, v in r.items() if k != "seconds"} for r in records(folder)]
        for folder in (out, tmp_path / "uninterrupted")
    )
    assert found == expected and recorded_pairs(out) == recorded_pairs(tmp_path / "uninterrupted")


def test_checkpoints_in_the_background_are_the_same(tied_run, tmp_path):
    """The run is stopped by a signal, so that it must wait for the last checkpoint, and resumed."""
    out = tmp_path / "out"
    overrides = ["parallel.pipeline=2", "train.save_every=4"]
    assert run(tied_run, tmp_path / "uninterrupted", *overrides) == [0, 0]
    overrides += ["train.save_in_background=true"]
    assert run(tied_run, out, *overrides, meanwhile=lambda: signal_rank(0, signal.SIGUSR1, out, 5)) == [85, 85]
    assert not list((out / "checkpoints").glob("*-unfinished"))
    assert run(tied_run, out, *overrides) == [0, 0]
    assert "resuming from" in out.with_suffix(".log.0").read_text()
    found, expected = (
        [{k: v for k, v in r.items() if k != "seconds"} for r in records(folder)]
        for folder in (out, tmp_path / "uninterrupted")
    )
    assert found == expected
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step_000016", "step_000020"]


def test_a_frozen_rank_ends_the_run_and_the_log_shows_a_traceback(tied_run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(AssertionError):
        run(
            tied_run,
            out,
            "parallel.pipeline=2",
            "train.hang_timeout_s=12",
            meanwhile=lambda: signal_rank(1, signal.SIGSTOP, out, 3),
        )
    log = out.with_suffix(".log.0").read_text()
    assert "Timeout (0:00:12)!" in log and "train.py" in log.split("Timeout")[1]


def test_the_watcher_reports_ranks_that_are_behind():
    watcher = Watcher(ranks=4, quiet=60)

    def seen(beat):
        return {
            0: [beat, 12, "distributed_c10d.all_reduce", "n1"],
            1: [beat, 12, "distributed_c10d.all_reduce", "n1"],
            2: [beat, 11, "streams.__getitem__", "n2"],
        }

    assert watcher.look(seen(1), still=10) is None
    assert watcher.look(seen(2), still=61) == (
        "heartbeat: no step for 61 s; 2 of 4 ranks are in distributed_c10d.all_reduce after step 12; "
        "rank 3: no heartbeat received; rank 2 on n2: in streams.__getitem__ after step 11"
    )
    assert watcher.look(seen(3), still=90) is None
    assert watcher.look(seen(4), still=130) is not None


def test_the_watcher_reports_silent_ranks(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    watcher = Watcher(ranks=2, quiet=60)
    watcher.look({0: [1, 5, "a.b", "n1"], 1: [1, 5, "a.b", "n2"]}, still=10)
    clock[0] = 70.0
    assert watcher.look({0: [8, 5, "a.b", "n1"], 1: [1, 5, "a.b", "n2"]}, still=80) == (
        "heartbeat: no step for 80 s; 1 of 2 ranks are in a.b after step 5; "
        "rank 1 on n2: no sign of life for 70 s, last step 5"
    )
