"""SIGUSR1, as --signal sends it before the time limit, in every phase of a job."""

import contextlib
import time
from pathlib import Path

from tests.slurm.conftest import ROOT, assert_complete, assert_same, log
from tests.slurm.test_survival import ranks_of, starts, stop_by_signal, wait_for_step

SCRIPT = ROOT / "slurm" / "treg_70b.sh"


def signal_during(slurm, job: str, program: str, importing: str = "", seconds: float = 120) -> None:
    """Send the signal to a job when ``program`` runs; all its ranks have begun to import ``importing``."""
    deadline = time.monotonic() + seconds
    while True:
        assert time.monotonic() < deadline, f"{program} did not run"
        with contextlib.suppress(OSError):
            ranks = ranks_of(slurm, program)
            maps = [Path(f"/proc/{rank}/maps").read_text() for rank in ranks]
            if ranks and all(importing in each for each in maps) and len(ranks) >= (2 if importing else 1):
                break
        time.sleep(0.02)
    slurm.run("scancel", "--signal=USR1", job)


def test_a_signal_in_each_phase(slurm, files, uninterrupted):
    """Checks of recipe and nodes, start-up, training: requeued each time, and the end is as ever."""
    run = files.run("signalled", save_every=1000)
    job = slurm.submit(SCRIPT, cwd=files.folder, RECIPE=str(run.recipe))
    for program, importing in (
        ("treg_megatron.preflight", ""),
        ("treg_megatron.node_check", "libtorch"),
        ("treg_megatron.train", "libtorch"),
    ):
        signal_during(slurm, job, program, importing)
        slurm.wait(job, "PENDING", "CONFIGURING")
    text = log(files, job)
    assert text.count("before there was anything to save (exit code") == text.count("requeueing") == 3
    assert text.count("anything to save (exit code 86)") >= 2 and "everything saved" not in text
    wait_for_step(run, 3)
    saved = stop_by_signal(slurm, run, job)
    assert "stopped by a signal, everything saved" in log(files, job)
    slurm.wait(job, "COMPLETED")
    assert starts(log(files, job))[-1] == f"resuming from {saved}"
    assert_complete(run)
    assert_same(run, uninterrupted)


def test_a_job_that_is_signalled_before_it_can_train_is_not_requeued_for_ever(slurm, files):
    job = slurm.submit(SCRIPT, cwd=files.folder, RECIPE=str(files.run("short").recipe), RETRIES="0")
    signal_during(slurm, job, "show_recipe.py")
    slurm.wait(job, "FAILED")
    assert "not requeued: 1 times in a row without progress" in log(files, job)
