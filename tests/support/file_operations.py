"""What is on disk, and what a program leaves there if it dies before any one of its file operations."""

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

_MODIFIES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.utime", "os.truncate"}
_watched: list[tuple[Path, Callable[[], None]]] = []
_installed = False


@contextlib.contextmanager
def before_each_operation(root: Path, look: Callable[[], None]) -> Iterator[None]:
    """Calls ``look`` before every operation that changes something below ``root``.

    Python tells of an operation before it does it. Bytes written by a file that is open are on disk as far as they have
    left its buffer, as if the process were killed.
    """
    global _installed
    if not _installed:  # an audit hook stays to the end of the process
        sys.addaudithook(_hook)
        _installed = True
    _watched.append((root, look))
    try:
        yield
    finally:
        _watched.pop()


def _hook(event: str, arguments: tuple) -> None:
    if not _watched or event not in _MODIFIES:
        return
    if event == "open" and not _writes(*arguments[1:3]):
        return
    root, look = _watched[-1]
    if any(isinstance(a, str | os.PathLike) and Path(a).is_relative_to(root) for a in arguments[:2]) or any(
        isinstance(a, int) and not isinstance(a, bool) and a > 2 for a in arguments[1:3]
    ):  # a path below root, or, as in rmtree, a name relative to the descriptor of a folder
        entry = _watched.pop()  # what `look` does is not looked at
        try:
            look()
        finally:
            _watched.append(entry)


def _writes(mode: str | None, flags: int | None) -> bool:
    return any(c in (mode or "") for c in "wax+") or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def contents(folder: str | Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    folder = Path(folder)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class States:
    """Copies of a folder, one for each time :meth:`keep` is called and something has changed."""

    def __init__(self, root: Path, copies: Path):
        self.root, self._copies = root, copies
        self.folders: list[Path] = []
        self._last: dict[str, bytes] | None = None

    def keep(self) -> None:
        """Copy the folder as it is now."""
        content = {
            path.relative_to(self.root).as_posix(): path.read_bytes() if path.is_file() else b""
            for path in sorted(self.root.rglob("*"))
        }
        if content != self._last:
            folder = self._copies / f"{len(self.folders):04d}"
            shutil.copytree(self.root, folder)
            self.folders.append(folder)
            self._last = content
