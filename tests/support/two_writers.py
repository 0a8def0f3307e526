"""Two jobs that write one output at the same time, of which one may be killed: what each says, and what is left."""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from treg_megatron.utils import entry

REFUSALS = ("is being written by", "already exists", "now belongs to")


class Contest(NamedTuple):
    """How two jobs on one output ended.

    Attributes:
        codes: exit codes; negative for a signal.
        messages: the last line that each of them wrote.
    """

    codes: tuple[int, int]
    messages: tuple[str, str]

    @property
    def refused(self) -> int:
        """Number of jobs that were refused because of the other one."""
        return sum(any(word in message for word in REFUSALS) for message in self.messages)

    def complaint(self, killed: bool) -> str | None:
        """What must not have happened; None if all is as it should be."""
        expected = {0, 2, -signal.SIGKILL} if killed else {0, 2}
        if not set(self.codes) <= expected or (not killed and 0 not in self.codes):
            return f"exit codes {self.codes}: {' | '.join(self.messages)}"
        for code, message in zip(self.codes, self.messages, strict=True):
            if code == 2 and not any(word in message for word in REFUSALS):
                return f"refused for another reason: {message}"
        return None


def contest(action: Callable[[], object], logs: Path, chance: random.Random, span: float, kill: bool) -> Contest:
    """Run ``action`` in two processes, each started at a random moment of ``span`` seconds.

    Args:
        action: what a command does after it has read its arguments.
        logs: folder for what the two write.
        kill: send SIGKILL to one of them at a random moment.
    """
    logs.mkdir(parents=True, exist_ok=True)
    jobs = [_start(action, logs / f"{i}.log", chance.uniform(0, span)) for i in range(2)]
    if kill:
        time.sleep(chance.uniform(0, 2 * span))
        os.kill(chance.choice(jobs), signal.SIGKILL)  # not waited for yet, so it exists even if it has ended
    codes = tuple(os.waitstatus_to_exitcode(os.waitpid(job, 0)[1]) for job in jobs)
    lines = [(logs / f"{i}.log").read_text().strip().splitlines() for i in range(2)]
    return Contest(codes, tuple(line[-1] if line else "" for line in lines))


def alone(action: Callable[[], object], log: Path) -> None:
    """Run ``action`` in a process of its own; it must succeed."""
    code = os.waitstatus_to_exitcode(os.waitpid(_start(action, log, 0), 0)[1])
    assert code == 0, f"exit code {code}: {log.read_text()}"


def _start(action: Callable[[], object], log: Path, delay: float) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        with open(log, "wb", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        time.sleep(delay)
        entry.run(lambda: [action(), None][1])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def remove(*paths: Path) -> None:
    """Remove files and folders, with their locks."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
        for left in path.parent.glob(f".{path.name}.lock*"):
            left.unlink(missing_ok=True)
