"""Runs the checks one after another and writes the card after each."""

import logging
import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from treg_megatron.accept.card import write_card
from treg_megatron.accept.check import FAIL, NOT_RUN, PASS, Check, Failed, Machine, NotRun, Result
from treg_megatron.accept.checks import CHECKS
from treg_megatron.distributed.cpu_redirect import DEVICES_VARIABLE
from treg_megatron.errors import UserError

logger = logging.getLogger(__name__)

CPU_RANKS = 4
ENDING_SECONDS = 10


def accept(output: Path, on_cpu: bool, only: Sequence[str] = ()) -> list[Result]:
    """Ask this machine every question; write acceptance.md and acceptance.json in ``output``, with a log of each check.

    Args:
        output: a folder that does not exist yet.
        on_cpu: use CPU ranks, also where there are GPUs.
        only: names of checks; the inputs are made in any case.

    Raises:
        UserError: ``output`` exists, a name is unknown, or the machine has no GPU and ``on_cpu`` is False.
    """
    unknown = set(only) - {check.name for check in CHECKS}
    if unknown:
        raise UserError(f"no check {unknown.pop()!r}; known: {', '.join(check.name for check in CHECKS)}")
    machine = this_machine(on_cpu)
    if output.exists():
        raise UserError(f"{output} already exists; delete it or choose another folder")
    output.mkdir(parents=True)
    chosen = [check for check in CHECKS if not only or check.name in ("inputs", *only)]
    results: list[Result] = []
    for number, check in enumerate(chosen, 1):
        result = asked(check, output, machine)
        results.append(result)
        logger.info("%2d/%d %-20s %-8s %5.0f s  %s", number, len(chosen), *_line(result))
        write_card(output, machine, results, finished=number == len(chosen))
        if check.name == "inputs" and result.status != PASS:
            break  # nothing else can run
    return results


def this_machine(on_cpu: bool) -> Machine:
    """The GPUs of this machine, or CPU ranks.

    Raises:
        UserError: torch sees no GPU and ``on_cpu`` is not set.
    """
    import torch

    gpus = 0 if on_cpu else torch.cuda.device_count()
    if not gpus and not on_cpu:
        raise UserError("torch sees no GPU on this machine: --cpu runs on CPU ranks what can run there")
    return Machine(gpus, gpus or CPU_RANKS)


def asked(check: Check, folder: Path, machine: Machine) -> Result:
    """Run a check in a process of its own, and end that and all that it started at the time limit."""
    start = time.monotonic()
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(
        target=_answer, args=(check.name, folder, machine, sender), daemon=False
    )
    process.start()
    sender.close()
    if receiver.poll(check.seconds):
        try:
            status, detail, figures = receiver.recv()
            process.join(ENDING_SECONDS)
        except EOFError:
            process.join()
            status, detail, figures = FAIL, f"the check ended with exit code {process.exitcode}", []
    else:
        status, detail, figures = FAIL, f"no answer within {check.seconds} s", []
    if process.is_alive():
        process.terminate()  # as an exception in it, which kills what it started
    process.join(ENDING_SECONDS)
    process.kill()
    return Result(check.name, check.question, status, detail, time.monotonic() - start, figures)


def _answer(name: str, folder: Path, machine: Machine, sender: Connection) -> None:
    import os
    import signal

    def stop(*_: object) -> None:
        raise SystemExit(1)

    signal.signal(signal.SIGTERM, stop)
    if not machine.gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault(DEVICES_VARIABLE, "labelled")  # the ranks then refuse much of what GPUs would
    check = next(check for check in CHECKS if check.name == name)
    try:
        answer = (PASS, "", list(check.run(folder, machine)))
    except NotRun as reason:
        answer = (NOT_RUN, str(reason), list(reason.figures))
    except Failed as reason:
        answer = (FAIL, str(reason), [])
    except Exception as error:
        answer = (FAIL, f"{type(error).__name__}: {error}".splitlines()[0], [])
    sender.send(answer)


def _line(result: Result) -> tuple[str, str, float, str]:
    figures = ", ".join(f"{name} {value:.3g} {unit}".rstrip() for name, value, unit in result.figures)
    return result.name, result.status, result.seconds, result.detail or figures
