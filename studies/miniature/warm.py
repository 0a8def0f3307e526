"""Runs commands in processes forked from one that has already imported everything they need.

Starting Python with NeMo takes longer than a run of the study. So this process imports once, and each command runs in a
forked child, as ``python tools/X.py ...`` or ``python -m MODULE ...`` would.
"""

import importlib
import multiprocessing
import multiprocessing.connection
import os
import pkgutil
import runpy
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from treg_megatron.errors import UserError

#: what the steps of the study import inside functions
PACKAGES = ("checkpoint", "cli", "data", "labelling", "models", "sampling", "training")
_FORK = multiprocessing.get_context("fork")


def warm_up() -> None:
    """Import all libraries on a single thread: forked children would wait for threads that they do not inherit."""
    from treg_megatron.utils.imports import heavy_imports
    from treg_megatron.utils.log import configure_logging

    configure_logging()
    import torch

    torch.set_num_threads(1)
    from treg_megatron.distributed.cpu_redirect import use_cpu

    use_cpu()
    with heavy_imports():
        for package in PACKAGES:
            folder = importlib.import_module(f"treg_megatron.{package}").__path__
            for module in pkgutil.walk_packages(folder, f"treg_megatron.{package}."):
                importlib.import_module(module.name)
        # transformers imports a class when it is first asked for
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401


def step(program: str, *arguments: object, log: Path) -> None:
    """Run ``python PROGRAM ARGUMENTS`` in a child process and append its output to ``log``.

    Args:
        program: a path such as tools/label_tokens.py, or the name of a module.

    Raises:
        UserError: the program failed; the log says why.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    child = _FORK.Process(target=_execute, args=(program, [str(argument) for argument in arguments], log))
    child.start()
    child.join()
    if child.exitcode:
        raise UserError(
            f"{program} failed with exit code {child.exitcode}, see the end of {log}; "
            "the same command continues from here"
        )


def run_jobs(jobs: dict[str, Callable[[], None]], processes: int, what: str) -> None:
    """Call each job in a child process, in order, ``processes`` at a time.

    Args:
        jobs: jobs by name.
        what: what to call a job in messages, such as "run".

    Raises:
        UserError: a job failed; running jobs are completed, but no other is started.
    """
    waiting, running, failed, start = list(jobs), {}, [], time.monotonic()
    while running or (waiting and not failed):
        while waiting and len(running) < processes and not failed:
            name = waiting.pop(0)
            running[name] = _FORK.Process(target=_call, args=(jobs[name],))
            running[name].start()
        multiprocessing.connection.wait([job.sentinel for job in running.values()])
        for name in [name for name, job in running.items() if not job.is_alive()]:
            failed += [name] * bool(_exit_code(running.pop(name)))
            done = len(jobs) - len(waiting) - len(running)
            print(f"{what} {done} of {len(jobs)}: {name}, {time.monotonic() - start:.0f} s", flush=True)
    if failed:
        raise UserError(f"{what} {', '.join(failed)} failed, see above; the same command continues from here")


def _exit_code(job: BaseProcess) -> int | None:
    job.join()
    return job.exitcode


def _call(job: Callable[[], None]) -> None:
    from treg_megatron.utils import entry

    entry.run(job)


def _execute(program: str, arguments: list[str], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(descriptor, "w", buffering=1, encoding="utf-8")
    print(f"$ python {program} {' '.join(arguments)}")
    _fork_checkpoint_manager()
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def _fork_checkpoint_manager() -> None:
    """Let Megatron fork, not spawn, the manager of its checkpoint writer's results, which would import torch again."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def queue():
        if filesystem_async._results_queue is None:
            filesystem_async._results_queue = _FORK.Manager().Queue()
        return filesystem_async._results_queue

    filesystem_async._get_write_results_queue = queue
