"""A check, how it runs, and what it may say."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

PASS, FAIL, NOT_RUN = "PASS", "FAIL", "not run"


class Machine(NamedTuple):
    """What the checks run on.

    Attributes:
        gpus: GPUs of this machine; 0 for CPU ranks.
        ranks: ranks that a check may start.
    """

    gpus: int
    ranks: int


class NotRun(Exception):
    """The machine lacks what a check needs; the message says what.

    Args:
        figures: what can be said nevertheless, as :attr:`Check.run` returns it.
    """

    def __init__(self, message: str, figures: Sequence[tuple[str, float, str]] = ()):
        super().__init__(message)
        self.figures = figures


class Failed(Exception):
    """A check found something wrong; the message says what."""


@dataclass(frozen=True)
class Check:
    """One question to a machine.

    Attributes:
        question: what only this machine can tell, as a question.
        run: answers it in the folder of inputs, or raises :class:`NotRun` or :class:`Failed`; returns figures as
            (name, value, unit).
        seconds: time limit.
    """

    name: str
    question: str
    run: Callable[[Path, Machine], Sequence[tuple[str, float, str]]]
    seconds: int = 180


@dataclass
class Result:
    """The answer to a check.

    Attributes:
        detail: of a failure or of a check that was not run, why.
    """

    name: str
    question: str
    status: str
    detail: str = ""
    seconds: float = 0.0
    figures: list[tuple[str, float, str]] = field(default_factory=list)


def run_python(log: Path, *arguments: object, ranks: int = 0, hide: Sequence[str] = (), **variables: str) -> str:
    """Run a Python program, under torchrun if ``ranks`` is given; return what it printed on stdout.

    Args:
        log: file that its stderr is appended to.
        hide: packages that it must not find.

    Raises:
        Failed: it ended with an error; the message is the line that says which.
    """
    with started(log, *arguments, ranks=ranks, hide=hide, **variables) as process:
        printed, _ = process.communicate()
    if process.returncode:
        raise Failed(_error_in(log.read_text(errors="replace")) or f"exit code {process.returncode}")
    return printed


@contextlib.contextmanager
def started(
    log: Path, *arguments: object, ranks: int = 0, hide: Sequence[str] = (), **variables: str
) -> Iterator[subprocess.Popen]:
    """A Python program that is running, as for :func:`run_python`; whatever is left of it at the end is killed."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    if hide:
        environment["PYTHONPATH"] = os.pathsep.join([str(_without(log.parent, hide)), os.environ.get("PYTHONPATH", "")])
    with open(log, "a") as errors:
        process = subprocess.Popen(
            [sys.executable, *torchrun, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
    try:
        yield process
    finally:
        for pid in _with_descendants(process.pid):  # torchrun's ranks have sessions of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def losses_of(run: Path) -> list[float]:
    """The training loss of every step of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def _with_descendants(pid: int) -> list[int]:
    """A process, and all that it and they have started and that still run."""
    found = [pid]
    for parent in found:
        for path in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, path.read_text().split())
    return found


def _without(folder: Path, packages: Sequence[str]) -> Path:
    """A folder that, at the front of the module path, makes packages impossible to import."""
    hidden = folder / "hidden"
    for package in packages:
        (hidden / package).mkdir(parents=True, exist_ok=True)
        (hidden / package / "__init__.py").write_text("raise ImportError('hidden for this check')\n")
    return hidden


def _error_in(log: str) -> str:
    """The line of a log that says what went wrong: an error of ours, or the last exception."""
    lines = [line.strip() for line in log.splitlines()]
    ours = [line for line in lines if line.startswith("error: ")]
    raised = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]+(Error|Exception|Interrupt|Fault)\b", line)]
    # torchrun's own, and those of ranks whose neighbour has ended
    causes = [line for line in raised if "ChildFailedError" not in line and "closed by peer" not in line]
    return (ours or causes or raised or [line for line in lines if line] or [""])[0 if ours else -1][:300]
