"""Fast transfer of tensors between files and memory, in pieces and without extra copies."""

import errno
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from treg_megatron.errors import UserError

# The size that `cp` uses. Writing a whole tensor at once makes the kernel allocate its page cache in huge pieces,
# which took 5 to 10 times as long on a virtual machine (Linux 6.18, ext4).
PIECE_BYTES = 128 * 1024

# copy_file_range fails so between different kinds of file systems, or on one that does not support it.
CANNOT_COPY_INSIDE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


class ByteRange(NamedTuple):
    """A byte range of a file, to be copied unchanged."""

    path: Path
    start: int
    nbytes: int


class ReusableBuffer:
    """Reusable buffer for one tensor at a time, as large as the largest tensor requested so far.

    Allocating gigabytes anew for each tensor takes longer than filling them.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor over the buffer, valid until the next call; its storage has exactly its size."""
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes > len(self._bytes):
            self._bytes = torch.empty(0, dtype=torch.uint8)  # free the old one before allocating a larger one
            self._bytes = torch.empty(nbytes, dtype=torch.uint8)
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._bytes.numpy(), dtype=dtype, count=math.prod(shape)).view(shape)


class OutputFile(io.FileIO):
    """Output file that writes data of any size in pieces of :data:`PIECE_BYTES`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "wb")

    def write(self, data) -> int:
        """Write all of a bytes-like object; return its size in bytes."""
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view):
            written += super().write(view[written : written + PIECE_BYTES])
        return written

    def copy(self, byte_range: ByteRange) -> int:
        """Append a byte range of another file, inside the kernel where supported; return the bytes written.

        Raises:
            UserError: the other file is too short.
        """
        copied = 0
        with open(byte_range.path, "rb", buffering=0) as source:
            while copied < byte_range.nbytes:
                try:
                    count = os.copy_file_range(
                        source.fileno(),
                        self.fileno(),
                        min(PIECE_BYTES, byte_range.nbytes - copied),
                        byte_range.start + copied,
                    )
                except OSError as error:
                    if error.errno not in CANNOT_COPY_INSIDE:
                        raise
                    rest = ByteRange(byte_range.path, byte_range.start + copied, byte_range.nbytes - copied)
                    return copied + sum(self.write(piece) for piece in read_pieces(rest))
                if not count:
                    raise UserError(f"{byte_range.path} is truncated")
                copied += count
        return copied


def copy_within_range(target: torch.Tensor, source: torch.Tensor, name: str) -> None:
    """Copy ``source`` into ``target``, in the precision of ``target``.

    Raises:
        UserError: a finite value of ``name`` is too large for that precision.
    """
    target.copy_(source)
    narrower = torch.finfo(target.dtype).max < torch.finfo(source.dtype).max
    if narrower and torch.count_nonzero(target.isinf()) > torch.count_nonzero(source.isinf()):
        precision = str(target.dtype).removeprefix("torch.")
        raise UserError(
            f"{name} has values beyond the range of {precision}, {torch.finfo(target.dtype).max:g}: "
            "choose another precision (export.dtype)"
        )


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, sharing its memory."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def read_pieces(byte_range: ByteRange) -> Iterator[memoryview]:
    """Read a byte range in pieces small enough to stay in the processor's cache until they are written.

    Each piece is valid until the next one is requested.

    Raises:
        UserError: the file is too short.
    """
    path, start, nbytes = byte_range
    buffer = memoryview(bytearray(min(PIECE_BYTES, nbytes)))
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while nbytes:
            count = file.readinto(buffer[:nbytes])
            if not count:
                raise UserError(f"{path} is truncated")
            yield buffer[:count]
            nbytes -= count


def read_into(path: Path, start: int, target: torch.Tensor) -> None:
    """Fill a contiguous CPU tensor with the bytes of a file from offset ``start``.

    Raises:
        UserError: the file is too short.
    """
    with open(path, "rb") as file:
        file.seek(start)
        if file.readinto(as_bytes(target)) != target.nbytes:
            raise UserError(f"{path} is truncated")
