"""Real ranks for tests: processes forked from one that has imported NeMo, so that the slow import happens once.

A rank runs as under torchrun: the same environment variables, gloo over loopback. The parent must never have started a
thread pool (it uses one torch thread), or a forked child may wait for threads that it did not inherit.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

TIMEOUT_SECONDS = 120


def warm_up() -> None:
    """Import all libraries in this process, with the CPU redirect on."""
    from treg_megatron.distributed.cpu_redirect import use_cpu
    from treg_megatron.utils.imports import heavy_imports
    from treg_megatron.utils.log import configure_logging

    configure_logging()
    import torch

    torch.set_num_threads(1)
    use_cpu()
    with heavy_imports():
        import treg_megatron.training.build  # noqa: F401
        import treg_megatron.training.data_module  # noqa: F401


def run_ranks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    log: Path | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> list[Any]:
    """Call ``function(*args)`` on every rank of a world of ``size``; return the results by rank.

    Args:
        log: output of the ranks goes to the files LOG.RANK.
        meanwhile: called in this process while the ranks run; if it raises, all ranks get SIGKILL.

    Raises:
        AssertionError: a rank failed or hung; all are killed, and the message is the failing rank's traceback.
    """
    context = multiprocessing.get_context("fork")
    port = _free_port()
    pipes, processes = [], []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(rank, size, port, sender, log, function, args))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        if meanwhile is not None:
            meanwhile()
        return _collect(pipes, processes)
    except AssertionError as error:
        raise AssertionError(f"{error}{_ends_of_logs(log, size)}") from None
    finally:
        for process in processes:
            process.kill()  # it may not lead a process group yet
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # Megatron's checkpoint writer leaves child processes
            process.join()


def _ends_of_logs(log: Path | None, size: int) -> str:
    """What each rank printed last: a rank that ends its process itself leaves no traceback."""
    texts = [Path(f"{log}.{rank}").read_text(errors="replace") for rank in range(size)] if log else []
    return "".join(f"\n-- rank {rank}:\n{text[-3000:]}" for rank, text in enumerate(texts) if text)


def _collect(pipes: list, processes: list) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.time() + TIMEOUT_SECONDS
    while len(results) < len(pipes):
        assert time.time() < deadline, f"ranks {set(range(len(pipes))) - set(results)} hung"
        ready = [
            r for r in range(len(pipes)) if r not in results and (pipes[r].poll(0.02) or not processes[r].is_alive())
        ]
        for rank in ready:
            try:
                ok, value = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                raise AssertionError(f"rank {rank} died with exit code {processes[rank].exitcode}") from None
            assert ok, f"rank {rank} failed:\n{value}"
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank(rank: int, size: int, port: int, sender, log: Path | None, function: Callable[..., Any], args: tuple) -> None:
    os.setsid()
    tqdm.set_lock(threading.RLock())  # the default lock is shared: a killed rank would never release it
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="test",
    )
    if log is not None:
        descriptor = os.open(f"{log}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.stderr = open(descriptor, "w", buffering=1, encoding="utf-8")  # not the parent's captured ones
    try:
        # plain pickle: multiprocessing's own would share tensors' memory with a process that is about to end
        result = pickle.dumps((True, function(*args)))
    except BaseException:
        result = pickle.dumps((False, traceback.format_exc()))
    sender.send_bytes(result)
    sender.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the parent's test session must not be torn down here


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
