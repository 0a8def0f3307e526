"""Replies of a judge on disk, so that none is paid for twice: not by a rerun, and not after a kill.

A cache is a folder of append-only files, one per process that writes at the same time. A line holds a request and its
reply, and is on disk before the reply counts. A killed process leaves at most an unfinished last line, which the next
one cuts off.
"""

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.utils.files import sha256_of_json
from treg_megatron.utils.lock import Held, Lock

logger = logging.getLogger(__name__)

FILE_PATTERN = "replies-{:05d}.jsonl"


def request_key(request: dict[str, Any], attempt: int) -> str:
    """What a reply is found by: the whole request, which names model and settings, and which attempt it is.

    The address of the server is left out: a judge that one runs oneself moves from node to node.
    """
    return sha256_of_json([request, attempt])


class ReplyCache:
    """The replies in ``folder``, and a file of this process's own to add to; a context manager.

    Raises:
        UserError: the folder cannot be written, or a file in it is damaged.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self._replies: dict[str, Any] = {}
        self._writing = threading.Lock()

    def __enter__(self) -> "ReplyCache":
        self._lock, path = self._own_file()
        try:
            self._stream = open(path, "ab", buffering=0)
            _cut_off_unfinished_line(path, self._stream)
            _sync_folder(self._folder)
            for file in sorted(self._folder.glob("replies-*.jsonl")):
                self._read(file)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._lock.release()

    def __len__(self) -> int:
        return len(self._replies)

    def find(self, key: str) -> Any:
        """The reply to the request of a key; None if there is none."""
        return self._replies.get(key)

    def add(self, key: str, request: dict[str, Any], attempt: int, reply: Any) -> None:
        """Write a reply; it is on disk when this returns.

        Raises:
            UserError: it cannot be written.
        """
        line = json.dumps({"key": key, "attempt": attempt, "request": request, "reply": reply}) + "\n"
        with self._writing:
            size = os.fstat(self._stream.fileno()).st_size
            try:
                _write_whole(self._stream.fileno(), line.encode())
                os.fsync(self._stream.fileno())
            except OSError as error:
                self._stream.truncate(size)
                raise UserError(f"cannot write {self._stream.name}: {error.strerror}") from None
            self._replies[key] = reply

    def _own_file(self) -> tuple[Lock, Path]:
        number = 0
        while True:
            path = self._folder / FILE_PATTERN.format(number)
            lock = Lock(path)
            try:
                lock.acquire(watch=False)
                return lock, path
            except Held:  # by another process that judges at this moment
                number += 1

    def _read(self, path: Path) -> None:
        with open(path, encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith("\n"):
                    return  # another process is writing it
                try:
                    entry = json.loads(line)
                    self._replies[entry["key"]] = entry["reply"]
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{path} line {number} is damaged; delete that line to ask for it anew") from None


def _cut_off_unfinished_line(path: Path, stream: Any) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        logger.warning("%s: a process was killed while it wrote a reply, which is asked for again", path)
        stream.truncate(whole)


def _write_whole(handle: int, content: bytes) -> None:
    while content:
        content = content[os.write(handle, content) :]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
