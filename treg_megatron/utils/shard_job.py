"""Resumable shard jobs: input cut into portions, each written as one file (a shard), distributed over processes.

A shard is written atomically, so a file that exists is finished, and an interrupted job resumes with those that do not
exist. Portions are independent of each other, so any number of processes can divide them, and a portion's content does
not depend on which process computes it. The first process that finds all shards finished writes the manifest. A
second job on the same folder is refused at the first portion that the first one is writing.
"""

import contextlib
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from treg_megatron.errors import UserError
from treg_megatron.utils.files import read_manifest, write_manifest
from treg_megatron.utils.lock import Held, Lock, remove_abandoned_locks
from treg_megatron.utils.progress import Progress

MANIFEST_NAME = "manifest.json"
RUN_NAME = "run.json"  # what the folder was begun with, written before the first shard

Item = TypeVar("Item")


@dataclass(frozen=True)
class Share:
    """The portions of one process: those whose number is ``index`` modulo ``count``.

    ``writes`` is False on processes that only take part in the computation, such as the other ranks of a split model.
    """

    index: int = 0
    count: int = 1
    writes: bool = True

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and number % self.count == self.index


@dataclass(frozen=True)
class ShardJob:
    """The shards of a job in the folder ``output``.

    Attributes:
        pattern: file name of a shard, such as ``shard-{:05d}.parquet``.
        total: number of items in the whole input.
        shard_size: items per shard; the last may hold fewer.
        is_current: whether the existing file of a portion was made from the portion as it is now.
    """

    output: Path
    pattern: str
    total: int
    shard_size: int
    share: Share = field(default_factory=Share)
    is_current: Callable[[int], bool] = lambda portion: True

    @property
    def portions(self) -> range:
        """Numbers of all portions."""
        return range(-(-self.total // self.shard_size))

    @property
    def paths(self) -> list[Path]:
        """The files of all portions, finished or not."""
        return [self.path(portion) for portion in self.portions]

    @property
    def mine(self) -> list[int]:
        """Numbers of this process's portions."""
        return [portion for portion in self.portions if portion in self.share]

    def path(self, portion: int) -> Path:
        """The file of a portion."""
        return self.output / self.pattern.format(portion)

    def finished(self) -> set[int]:
        """Numbers of the portions whose file exists and is current."""
        return {portion for portion in self.portions if self.path(portion).exists() and self.is_current(portion)}

    def progress(self, command: str, unit: str, finished: Container[int]) -> Progress:
        """Progress over this process's items, shown by the first process only."""
        sizes = {p: min(self.shard_size, self.total - p * self.shard_size) for p in self.mine}
        done = sum(size for portion, size in sizes.items() if portion in finished)
        shown = self.share.writes and self.share.index == 0
        return Progress(command, unit, sum(sizes.values()), done, shown=shown)

    def unfinished(self, items: Iterable[Item], finished: Container[int]) -> Iterator[tuple[int, list[Item]]]:
        """This process's portions that are not ``finished``, with their items; reads no further than the last one.

        A portion is locked while the caller works on it.

        Args:
            items: the whole input, in order.
            finished: numbers of the portions to skip.

        Raises:
            UserError: another process is writing a portion.
        """
        due = [portion for portion in self.mine if portion not in finished]
        if not due:
            return
        wanted, portion = set(due), []
        for position, item in enumerate(items):
            number = position // self.shard_size
            if number in wanted:
                portion.append(item)
                if len(portion) == self.shard_size or position + 1 == self.total:
                    with self._lock(number):
                        yield number, portion
                    portion = []
                    if number == due[-1]:
                        return

    def require_free(self, finished: Container[int]) -> None:
        """Check that no other process is writing this process's next portion; call it before a model is loaded.

        Raises:
            UserError: one is.
        """
        for portion in self.mine:
            if portion not in finished:
                with self._lock(portion):
                    return

    def _lock(self, portion: int) -> contextlib.AbstractContextManager:
        return Lock(self.path(portion)) if self.share.writes else contextlib.nullcontext()

    def finish(self, format: str, version: int, content: dict[str, Any]) -> dict[str, Any]:
        """Write the manifest, unless another process of the job has just done so, and return it as read back."""
        manifest = self.output / MANIFEST_NAME
        while not manifest.exists():
            try:
                with Lock(manifest):
                    if not manifest.exists():
                        write_manifest(manifest, format, version, content)
            except Held:
                time.sleep(0.05)
        remove_abandoned_locks(self.output)
        return read_manifest(manifest, format, version)


def require_same_run(found: dict[str, Any] | None, run: dict[str, Any], what: str, key: str) -> None:
    """Check that existing output was made by the run that is to be resumed.

    Args:
        found: fingerprint of the run that made it, or None.
        run: fingerprint of this run.
        what: the subject of the message, such as ``out/shard-00000.parquet is a run``.
        key: recipe key that names the output folder.

    Raises:
        UserError: they differ.
    """
    if found != run:
        found = found or {}
        different = ", ".join(name for name in {**run, **found} if found.get(name) != run.get(name))
        raise UserError(f"{what} with another {different}; name another {key}, or remove that folder")


def require_folder_of_run(
    output: Path, format: str, version: int, run: dict[str, Any], content: str, key: str, shared: bool = False
) -> None:
    """Check that an output folder is new, empty, or was begun by this run, as its ``run.json`` says.

    Args:
        format, version: of ``run.json``.
        run: fingerprint of this run.
        content: what such folders hold, such as ``samples``.
        key: recipe key that names the folder.
        shared: whether other processes of the job may be at work there, whose locks are hidden files.

    Raises:
        UserError: it holds another run's output, or something else.
    """
    if (output / RUN_NAME).exists():
        found = read_manifest(output / RUN_NAME, format, version)["run"]
        require_same_run(found, run, f"{output} holds {content}", key)
    elif output.is_dir() and any(not (shared and path.name.startswith(".")) for path in output.iterdir()):
        raise UserError(f"{output} is not empty and has no {RUN_NAME}; name another {key}")
