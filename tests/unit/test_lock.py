"""One writer per output: who gets the lock, who is told what, and when a lock is taken over."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from treg_megatron.errors import UserError
from treg_megatron.utils import lock as lock_module
from treg_megatron.utils.lock import Lock, _name_of, _read, _this_process, remove_abandoned_locks

pytestmark = pytest.mark.slow

ANOTHER_NODE = {"node": "node9", "boot": "another", "pid": 1}


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "runs" / "x"


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


def left_behind(output: Path, **changes) -> Path:
    """A lock file as another process would have left it."""
    path = Lock(output).path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(_this_process()) | {"token": "theirs"} | changes))
    return path


def silent_for(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def a_dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@contextlib.contextmanager
def beating(path: Path) -> Iterator[None]:
    """Another process gives the lock a sign of life while the block runs."""
    beat = multiprocessing.get_context("fork").Process(target=lambda: (time.sleep(0.3), os.utime(path)))
    beat.start()
    yield
    beat.join()


def scontrol(tmp_path: Path, script: str) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "bin" / "scontrol").chmod(0o755)


def test_a_lock_is_released_and_leaves_nothing(output):
    with Lock(output) as lock:
        lock.require_held()
        assert [p.name for p in output.parent.iterdir()] == [".x.lock"]
    assert not output.parent.exists()


def test_the_second_writer_is_told_who_the_first_is(output, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NAME", "treg_70b")
    monkeypatch.setenv("SLURMD_NODENAME", "node3")
    with Lock(output) as lock:
        with pytest.raises(
            UserError, match=rf"x is being written by job 17 \(treg_70b\), process {os.getpid()} on node3"
        ):
            Lock(output).acquire()
        lock.require_held()


def test_a_dead_process_of_this_machine_loses_its_lock(output):
    left_behind(output, pid=a_dead_process())
    with Lock(output) as lock:
        lock.require_held()


def test_a_pid_that_is_used_again_does_not_keep_a_lock(output):
    left_behind(output, started=1)
    with Lock(output) as lock:
        lock.require_held()


def test_a_living_process_keeps_its_lock_however_silent(output):
    silent_for(left_behind(output), 1e6)
    with pytest.raises(UserError, match="is being written by"):
        Lock(output).acquire()


def test_another_node_that_gives_signs_of_life_keeps_its_lock(output, monkeypatch):
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.1)
    path = left_behind(output, **ANOTHER_NODE)
    silent_for(path, 100)
    with beating(path), pytest.raises(UserError, match="is being written by process 1 on node9"):
        Lock(output).acquire()


def test_another_node_that_stays_silent_loses_its_lock(output, monkeypatch):
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 0.5)
    left_behind(output, **ANOTHER_NODE)
    start = time.monotonic()
    with Lock(output) as lock:
        assert time.monotonic() - start > 0.4
        lock.require_held()


@pytest.mark.parametrize("text", ["", "{", '{"token": "x"}'])
def test_a_lock_that_names_nobody_is_waited_for(text, output, monkeypatch):
    monkeypatch.setattr(lock_module, "STALE_SECONDS", 0.3)
    left_behind(output).write_text(text)
    with Lock(output) as lock:
        lock.require_held()


@pytest.mark.parametrize(
    "script, gone",
    [
        ("echo JobId=17 JobState=COMPLETED", True),
        ("echo JobId=17 JobState=TIMEOUT", True),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", True),
        ("echo JobId=17 JobState=RUNNING", False),
        ("echo JobId=17 JobState=COMPLETING", False),
        ("echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1", False),
    ],
)
def test_slurm_can_prove_that_a_job_is_gone(script, gone, output, tmp_path, monkeypatch):
    scontrol(tmp_path, script)
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.1)
    path = left_behind(output, **ANOTHER_NODE, job="17")
    if gone:
        with Lock(output) as lock:
            lock.require_held()
        return
    with beating(path), pytest.raises(UserError, match="is being written by job 17, process 1 on node9"):
        Lock(output).acquire()


def test_the_jobs_of_other_users_are_not_judged_by_slurm(output, tmp_path, monkeypatch):
    scontrol(tmp_path, "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.1)
    path = left_behind(output, **ANOTHER_NODE, job="17", user=os.getuid() + 1)
    with beating(path), pytest.raises(UserError, match="is being written by"):
        Lock(output).acquire()


def test_an_earlier_start_of_the_same_job_is_gone(output, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    left_behind(output, **ANOTHER_NODE, restart="0")
    with Lock(output) as lock:
        lock.require_held()


def test_a_holder_that_was_only_silent_finds_out(output):
    with Lock(output) as lock:
        left_behind(output, node="node9", pid=4)
        assert not lock.is_held()
        with pytest.raises(UserError, match="x now belongs to process 4 on node9, since .*; this process stops"):
            lock.require_held()
    assert _read(Lock(output).path).node == "node9", "the lock of the other process must stay"


def test_a_lock_whose_file_was_removed_does_not_count(output):
    with Lock(output) as lock:
        lock.path.unlink()
        with pytest.raises(UserError, match="belongs to nobody: its lock file was removed"):
            lock.require_held()


def test_a_forked_child_does_not_release_the_lock(output):
    with Lock(output) as lock:
        child = multiprocessing.get_context("fork").Process(target=lock.release)
        child.start()
        child.join()
        lock.require_held()


def test_the_holder_gives_signs_of_life(output, monkeypatch):
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.05)
    with Lock(output) as lock:
        silent_for(lock.path, 1000)
        deadline = time.monotonic() + 20
        while time.time() - lock.path.stat().st_mtime > 500:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_without_hard_links_the_lock_works_the_same(output, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with Lock(output) as lock:
        lock.require_held()
        with pytest.raises(UserError, match="is being written by"):
            Lock(output).acquire()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file/x: a folder above it is a file"):
        Lock(tmp_path / "file" / "x").acquire()


RACER = """
import sys, time
from collections.abc import Iterator
from pathlib import Path
from treg_megatron.errors import UserError
from treg_megatron.utils.lock import Lock
print("ready", flush=True)
sys.stdin.readline()
try:
    with Lock(sys.argv[1]) as lock:
        inside = Path(sys.argv[1] + ".inside")
        inside.touch(exist_ok=False)
        time.sleep(0.005)
        lock.require_held()
        inside.unlink()
        print("won")
except UserError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dead_holder", [False, True])
def test_of_many_racers_one_at_a_time_is_inside(dead_holder, output):
    """Also while they all find the lock of a dead process, which exactly one of them may replace."""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(output)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(8)
    ]
    for racer in racers:
        racer.stdout.readline()
    if dead_holder:
        left_behind(output, pid=a_dead_process())
    else:
        output.parent.mkdir(parents=True)
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    said = [racer.communicate(timeout=60)[0].strip() for racer in racers]
    assert "won" in said
    assert all(line == "won" or "is being written by process" in line for line in said), said


@pytest.mark.parametrize(
    "clean", [lambda output: remove_abandoned_locks(output.parent), lambda output: Lock(output).acquire()]
)
def test_a_process_killed_before_it_wrote_its_candidate_leaves_nothing(tmp_path, clean):
    """An empty candidate says by its name whose it is; that of a living process, or of another machine, stays."""
    output, here = tmp_path / "shard", _this_process()
    dead = dataclasses.replace(here, pid=a_dead_process(), started=1)
    abroad = dataclasses.replace(dead, boot="another")
    paths = [tmp_path / f".shard.lock.{_name_of(holder)}" for holder in (dead, here, abroad)]
    for path in paths:
        path.touch()
    clean(output)
    assert [path.exists() for path in paths] == [False, True, True]
