"""SIGUSR1, Slurm's warning of a time limit or a preemption: what it does before training, how early it must come."""

import ctypes
import math
import os
import signal
import sys
import threading
import time
from types import FrameType

from treg_megatron.utils.log import rank_of_environment

#: exit code of a command that SIGUSR1 ended before it had anything to save
EXIT_INTERRUPTED = 86
#: srun kills the other ranks when one ends: each waits until all have the signal, so that all end with the same code
TOGETHER_SECONDS = 1.0
#: how long before the time limit the scripts in slurm/ ask for the signal
SIGNAL_SECONDS = 600

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>

_ending = threading.Lock()


def end_on_signal() -> None:
    """Exit with :data:`EXIT_INTERRUPTED` on SIGUSR1, until the process installs another handler.

    Python runs a handler between two bytecodes, and a rank may wait for others inside a C function for minutes: a
    thread, which the signal wakes up, ends the process from there.
    """
    if signal.getsignal(signal.SIGUSR1) is _end:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGUSR1, _end)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # a forked child shares the pipe: its signals are not this process's
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()


def end_with_parent() -> None:
    """End this process when the one that started it ends, however that ends; on Linux only.

    Megatron's checkpoint writer keeps a queue in a process of its own, which would outlive a rank that is killed and
    keep its memory.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def seconds_before_time_limit() -> int | None:
    """When the signal comes, as a job script says; None outside of one."""
    text = os.environ.get("SIGNAL_SECONDS", "")
    return int(text) if text.isdigit() else None


def advised_seconds(save: float) -> int:
    """When the signal should come for a save of so many seconds: twice as early, as storage varies; whole minutes."""
    return 60 * math.ceil(save / 30)


def _end(number: int, frame: FrameType | None) -> None:
    for ignored in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)
    _exit()


def _watch(reader: int) -> None:
    while woken_by := os.read(reader, 1):
        if woken_by[0] == signal.SIGUSR1 and signal.getsignal(signal.SIGUSR1) is _end:
            _exit()


def _exit() -> None:
    _ending.acquire()  # never released: the handler and the thread both come here
    if rank_of_environment() == 0:
        os.write(2, b"stopped by SIGUSR1 before there was anything to save; rerun the same command to continue\n")
    time.sleep(TOGETHER_SECONDS)
    os._exit(EXIT_INTERRUPTED)
