"""Work on batches in several processes, with the results in the order of the batches."""

import itertools
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")
Batch = TypeVar("Batch")
Result = TypeVar("Result")

_AHEAD = 4  # batches per process that wait for it

_work: Callable[[Any], Any] | None = None


def batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """``items`` in lists of ``size``; the last may hold fewer."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def usable_cores(processes_here: int = 1) -> int:
    """Cores for one of several equal processes on this machine, at least 1."""
    return max(len(os.sched_getaffinity(0)) // processes_here, 1)


def in_order(work: Callable[[Batch], Result], batches: Iterable[Batch], workers: int) -> Iterator[Result]:
    """``work`` of each batch, in order; a few batches per process are in memory, whatever their number.

    Processes are forked: they inherit loaded modules and whatever ``work`` refers to.
    """
    if workers <= 1:
        yield from map(work, batches)
        return
    with multiprocessing.get_context("fork").Pool(workers, _set_work, (work,)) as pool:
        waiting: deque = deque()
        for batch in batches:
            waiting.append(pool.apply_async(_call, (batch,)))
            if len(waiting) > _AHEAD * workers:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()


def _set_work(work: Callable[[Any], Any]) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    _work = work


def _call(batch: Any) -> Any:
    assert _work is not None
    return _work(batch)
