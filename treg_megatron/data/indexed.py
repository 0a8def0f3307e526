"""Reader and writer of Megatron's indexed dataset format, without importing Megatron.

A ``.bin`` file holds concatenated sequences of one dtype. Its ``.idx`` file says where each sequence begins and which
sequences make up a document. Layout of the index, little-endian:

    9 bytes   magic "MMIDIDX\\0\\0"
    8 bytes   version, 1
    1 byte    dtype (the codes of :data:`DTYPE_CODES`)
    8 bytes   S, the number of sequences
    8 bytes   D, one more than the number of documents
    S int32   length of each sequence in elements
    S int64   offset of each sequence in the .bin file in bytes
    D int64   the first sequence of each document, and S

The format is that of ``megatron.core.datasets.indexed_dataset.IndexedDataset``: each can read the other's files.
"""

import array
import hashlib
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from treg_megatron.errors import UserError
from treg_megatron.utils.files import hash_blocks, sha256_of

DTYPE_CODES = {
    np.dtype(name): code
    for code, name in enumerate(("uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"), start=1)
}

_HEADER = struct.Struct("<9sQBQQ")
_COPIED_AT_ONCE = 1 << 24
_END = 1 << 16
_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1


class IndexedWriter:
    """Streaming writer of documents of at most 65,535 sequences each.

    Memory grows by 4 bytes per sequence and 2 per document; :meth:`finish` briefly needs 8 more per sequence and per
    document.
    """

    def __init__(self, bin_path: Path, idx_path: Path, dtype: np.dtype | type):
        self.bin_path, self.idx_path, self.dtype = bin_path, idx_path, np.dtype(dtype)
        self._bin = open(bin_path, "wb", buffering=1 << 20)
        self._digest = hashlib.sha256()
        self._lengths = array.array("i")
        self._document_sizes = array.array("H")

    def add_document(self, sequences: Sequence[np.ndarray]) -> None:
        """Append a document of sequences, each 1-D and cast to the dataset's dtype."""
        for sequence in sequences:
            content = np.ascontiguousarray(sequence, dtype=self.dtype).data.cast("B")
            self._bin.write(content)
            self._digest.update(content)
            self._lengths.append(len(sequence))
        self._document_sizes.append(len(sequences))

    def append(self, reader: "IndexedReader") -> None:
        """Append all documents of another dataset of the same dtype."""
        for start in range(0, reader.numbers.nbytes, _COPIED_AT_ONCE):
            content = reader.numbers.view(np.uint8)[start : start + _COPIED_AT_ONCE].data
            self._bin.write(content)
            self._digest.update(content)
        self._lengths.frombytes(reader.lengths.tobytes())
        self._document_sizes.frombytes(np.diff(reader.document_starts).astype(np.uint16).tobytes())

    def finish(self) -> dict[str, dict]:
        """Close the .bin file, write the .idx file, and return size and hashes of both, keyed ``bin`` and ``idx``."""
        self._bin.close()
        lengths, sizes = np.array(self._lengths, dtype=np.int32), np.array(self._document_sizes, dtype=np.int64)
        with open(self.idx_path, "wb") as stream:
            stream.write(_HEADER.pack(_MAGIC, _VERSION, DTYPE_CODES[self.dtype], len(lengths), len(sizes) + 1))
            stream.write(lengths.tobytes())
            stream.write(_offsets(lengths, self.dtype).tobytes())
            stream.write(np.cumsum(np.append(0, sizes)))
        return {
            "bin": {
                "bytes": self.bin_path.stat().st_size,
                "sha256": self._digest.hexdigest(),
                "ends": ends_of(self.bin_path),
            },
            "idx": {
                "bytes": self.idx_path.stat().st_size,
                "sha256": sha256_of(self.idx_path),
                "ends": ends_of(self.idx_path),
            },
        }

    def close(self) -> None:
        """Release the file without finishing it."""
        self._bin.close()


class IndexedReader:
    """A memory-mapped indexed dataset.

    Attributes:
        dtype: of the sequences.
        lengths: int32 [sequences], number of elements of each.
        document_starts: int64 [documents + 1], first sequence of each document, then the number of sequences.
        numbers: all sequences concatenated, [elements] of ``dtype``; a read-only view of the file.

    Raises:
        UserError: a file is missing, is not an indexed dataset, or index and data disagree.
    """

    def __init__(self, bin_path: Path, idx_path: Path):
        index = _mapped(idx_path)
        if len(index) < _HEADER.size:
            raise UserError(f"{idx_path} is truncated: {len(index)} bytes are too few for an index")
        magic, version, code, sequences, boundaries = _HEADER.unpack(index[: _HEADER.size].tobytes())
        dtypes = {code: dtype for dtype, code in DTYPE_CODES.items()}
        if magic != _MAGIC or version != _VERSION or code not in dtypes:
            raise UserError(
                f"{idx_path} is not a Megatron index (magic {magic!r}, version {version}, dtype code {code})"
            )
        if len(index) != _HEADER.size + sequences * (4 + 8) + boundaries * 8:
            raise UserError(f"{idx_path} has {len(index)} bytes, which does not fit its {sequences} sequences")
        self.dtype = dtypes[code]
        self.lengths, offsets, self.document_starts = _split(index[_HEADER.size :], sequences, boundaries)
        self.numbers = _mapped(bin_path)
        if (self.lengths < 0).any() or not np.array_equal(offsets, _offsets(self.lengths, self.dtype)):
            raise UserError(f"{idx_path}: offsets do not follow from lengths")
        if len(self.numbers) != (needed := int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize):
            raise UserError(f"{bin_path} has {len(self.numbers)} bytes, its index needs {needed}")
        if (
            boundaries < 1
            or self.document_starts[0] != 0
            or self.document_starts[-1] != sequences
            or (np.diff(self.document_starts) < 0).any()
        ):
            raise UserError(f"{idx_path}: documents do not cover the sequences in order")
        self.numbers = self.numbers.view(self.dtype)
        self._starts = offsets // self.dtype.itemsize

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, sequence: int) -> np.ndarray:
        """One sequence, [length] of ``dtype``; a read-only view of the file."""
        start = self._starts[sequence]
        return self.numbers[start : start + self.lengths[sequence]]


def ends_of(path: Path) -> str:
    """SHA-256 hex digest of the first and last 64 KiB of a file: a cheap fingerprint that costs two reads."""
    digest = hashlib.sha256()
    hash_blocks(digest, path, (0, max(path.stat().st_size - _END, 0)), _END)
    return digest.hexdigest()


def _mapped(path: Path) -> np.ndarray:
    try:
        if path.stat().st_size == 0:
            return np.zeros(0, dtype=np.uint8)
        return np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _split(body: np.ndarray, sequences: int, boundaries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lengths, offsets, starts = np.split(body, [sequences * 4, sequences * 12])
    return lengths.view(np.int32), offsets.view(np.int64), starts.view(np.int64)


def _offsets(lengths: np.ndarray, dtype: np.dtype) -> np.ndarray:
    offsets = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
    offsets *= dtype.itemsize
    return offsets
