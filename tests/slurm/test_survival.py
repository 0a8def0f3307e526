"""Failures that clusters cause: the numbers are as if nothing had happened, each pair is seen once per epoch."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.slurm.conftest import ROOT, Files, Run, assert_complete, assert_same, log

SCRIPT = ROOT / "slurm" / "treg_70b.sh"


def start(slurm, files: Files, run: Run, **variables: str) -> str:
    return slurm.submit(SCRIPT, cwd=files.folder, RECIPE=str(run.recipe), CHECKS="", **variables)


def wait_for_step(run: Run, step: int, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while run.step() < step:
        assert time.monotonic() < deadline, f"step {step} not reached; the run is at {run.step()}"
        time.sleep(0.02)


def wait_for_log(files: Files, job: str, words: str, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while words not in log(files, job):
        assert time.monotonic() < deadline, f"the job's log never said {words!r}"
        time.sleep(0.02)


def starts(text: str) -> list[str]:
    """Where each start of a run began."""
    return [line.split(", ")[-1] for line in text.splitlines() if "steps of 8 pairs, " in line]


def ranks_of(slurm, program: str = "treg_megatron.train") -> list[int]:
    """The ranks' processes in order of rank: what slurmstepd started; checkpoint writers are their children."""
    found = {}
    for pid in slurm.processes(program, "--recipe"):
        parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        if b"slurmstepd" in Path(f"/proc/{parent}/cmdline").read_bytes():
            variables = dict(
                entry.split("=", 1) for entry in Path(f"/proc/{pid}/environ").read_text().split("\0") if entry
            )
            found[int(variables["SLURM_PROCID"])] = pid
    return [found[rank] for rank in sorted(found)]


def stop_by_signal(slurm, run, job) -> str:
    """Send SIGUSR1, as --signal does before the time limit; the one checkpoint there is once the job is requeued."""
    slurm.run("scancel", "--signal=USR1", job)
    slurm.wait(job, "PENDING", "CONFIGURING")
    [checkpoint] = run.checkpoints()
    return checkpoint


def test_a_killed_rank_a_new_controller_and_a_node_without_power(slurm, files, uninterrupted):
    """SIGKILL of one rank, slurmctld restarted, a node off in mid-step with a spare node: one after another."""
    run = files.run("hardware")
    job = start(slurm, files, run)
    wait_for_step(run, 7)
    os.kill(ranks_of(slurm)[-1], signal.SIGKILL)
    wait_for_log(files, job, "restarting (consecutive failure")
    wait_for_step(run, 13)
    slurm.restart_controller()
    wait_for_step(run, 19)
    slurm.power_off("node2")
    slurm.wait(job, "COMPLETED")
    text = log(files, job)
    begun = starts(text)
    assert len(begun) == 3 and begun[0] == f"starting from {files.folder}/shared/megatron"
    assert all(re.fullmatch(r"resuming from step_0000[0-3][05]", again) for again in begun[1:]) and begun[1] < begun[2]
    assert "restarting (consecutive failure 1 of 3)" in text
    assert "node2" not in slurm.run("scontrol", "show", "hostnames", slurm.field(job, "NodeList")).split()
    assert_complete(run)
    assert_same(run, uninterrupted)


def test_a_warning_before_the_time_limit_then_a_preemption(slurm, files, uninterrupted):
    """SIGUSR1, as --signal sends it: saved at once, requeued by the script. Then a job of a higher partition."""
    run = files.run("preempted", save_every=1000)
    job = start(slurm, files, run)
    wait_for_step(run, 6)
    first = stop_by_signal(slurm, run, job)
    assert 6 <= int(first[-6:]) < 40
    slurm.wait(job, "RUNNING")
    wait_for_step(run, int(first[-6:]) + 4)
    urgent = slurm.run(
        "sbatch",
        "--parsable",
        "--partition=high",
        f"--nodes={len(slurm.names)}",
        "--exclusive",
        "--wrap=sleep 3",
        "--output=/dev/null",
    )
    slurm.wait(urgent, "COMPLETED")
    slurm.wait(job, "COMPLETED")
    text = log(files, job)
    begun = starts(text)
    assert len(begun) == 3 and begun[1] == f"resuming from {first}" and begun[2] > begun[1]
    assert text.count("is saved; rerun the same command to continue") == 2
    assert_complete(run)
    assert_same(run, uninterrupted)


def test_a_time_limit_without_warning_is_taken_up_by_the_successor(slurm, files, uninterrupted):
    """The ranks hang until the time limit. Before the next job starts, the newest checkpoint is damaged, too."""
    run = files.run("limited")
    job = start(slurm, files, run, CHAIN="1", SBATCH_TIMELIMIT="10", SBATCH_SIGNAL="URG@1")
    wait_for_step(run, 12)
    successor = log(files, job).split("successor: job ")[1].split()[0]
    slurm.run("scontrol", "hold", successor)
    slurm.run("scontrol", "update", f"jobid={job}", "timelimit=1")
    while slurm.state(job) in ("RUNNING", "COMPLETING"):
        for rank in ranks_of(slurm):
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGSTOP)  # again and again: at the limit Slurm sends SIGCONT
        time.sleep(0.05)
    slurm.wait(job, "TIMEOUT")
    *_, before, newest = sorted(path.parent for path in (run.folder / "checkpoints").glob("step_*/treg.json"))
    part = next(newest.glob("weights/*.distcp"))
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    slurm.run("scontrol", "release", successor)
    slurm.wait(successor, "COMPLETED")
    text = log(files, successor)
    assert starts(text) == [f"resuming from {before.name}"] and before.name < "step_000040"
    assert f"checkpoint {newest.name} is damaged (weights/{part.name} is not what was written)" in text
    assert_complete(run)
    assert_same(run, uninterrupted)


def test_a_rank_that_hangs_is_named_shown_and_ended(slurm, files, uninterrupted):
    """The second rank stops for good: every other prints its stack, and the job goes on by itself."""
    run = files.run("hung", hang_timeout_s=20)
    job = start(slurm, files, run)
    wait_for_step(run, 8)
    os.kill(ranks_of(slurm)[-1], signal.SIGSTOP)
    slurm.wait(job, "COMPLETED")
    text = log(files, job)
    assert re.search(
        r"heartbeat: no step for \d+ s; 1 of 2 ranks are in .*; rank 1 on node2: no sign of life for", text
    )
    assert "Timeout (0:00:20)!" in text and "most recent call first" in text
    assert re.fullmatch(r"resuming from step_0000(05|10)", starts(text)[1])
    assert_complete(run)
    assert_same(run, uninterrupted)


def test_another_layout_takes_the_run_up(slurm, files, uninterrupted):
    """Two pipeline ranks, stopped by a signal; two data-parallel ranks continue with the same losses."""
    run = files.run("relaid", save_every=1000)
    job = start(slurm, files, run)
    wait_for_step(run, 6)
    stopped = stop_by_signal(slurm, run, job)
    slurm.run("scancel", job)
    again = slurm.submit(SCRIPT, "parallel.pipeline=1", cwd=files.folder, RECIPE=str(run.recipe), CHECKS="")
    slurm.wait(again, "COMPLETED")
    assert starts(log(files, again)) == [f"resuming from {stopped}"]
    for ours, theirs in zip(run.records(), uninterrupted.records(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
