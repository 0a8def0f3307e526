"""SIGUSR1, by which Slurm warns a job, before training has begun."""

import logging
import subprocess
import sys

import pytest

from treg_megatron.utils.signals import advised_seconds

pytestmark = pytest.mark.slow

SIGNALLED = """
import os, signal, threading, time
from treg_megatron.utils import entry
def main():
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    WAIT
entry.run(main)
"""


@pytest.mark.parametrize(
    "wait",
    [
        "while True: pass",
        # in C, as a rank that waits for others is: Python's handlers do not run there
        "import ctypes; ctypes.CDLL(None).pause(); [ctypes.CDLL(None).pause() for _ in range(9)]",
        "os.kill(os.getpid(), signal.SIGUSR1); os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)",
    ],
)
def test_a_signal_before_there_is_anything_to_save(wait):
    """Exit code 86 from the start, even when another rank's end makes srun send SIGTERM meanwhile."""
    done = subprocess.run([sys.executable, "-c", SIGNALLED.replace("WAIT", wait)], capture_output=True, text=True)
    assert done.returncode == 86
    assert done.stderr == "stopped by SIGUSR1 before there was anything to save; rerun the same command to continue\n"


def test_the_signal_comes_twice_as_early_as_a_save_takes():
    assert [advised_seconds(seconds) for seconds in (1, 30, 299, 568)] == [60, 60, 600, 1140]


@pytest.mark.parametrize("told, seconds, warned", [("600", 299, False), ("600", 301, True), (None, 10_000, False)])
def test_a_save_that_takes_too_long_for_the_signal(told, seconds, warned, monkeypatch, caplog):
    from treg_megatron.training.callbacks.checkpoints import warn_of_slow_save

    monkeypatch.delenv("SIGNAL_SECONDS", raising=False)
    if told:
        monkeypatch.setenv("SIGNAL_SECONDS", told)
    monkeypatch.setattr(logging.getLogger("treg_megatron"), "propagate", True)
    warn_of_slow_save(seconds)
    assert ("a save takes 301 s" in caplog.text and "SBATCH_SIGNAL=USR1@660" in caplog.text) == warned


def test_the_signal_of_a_forked_child_does_not_end_its_parent():
    program = (
        "import os, signal, time\n"
        "from treg_megatron.utils.signals import end_on_signal\n"
        "end_on_signal()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    signal.signal(signal.SIGUSR1, lambda *_: os._exit(7))\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    time.sleep(60)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\n"
        "time.sleep(2)\n"
        "print('alive')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done
