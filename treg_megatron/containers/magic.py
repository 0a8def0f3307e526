"""What a file is by its first bytes, and its bytes without compression."""

import bz2
import gzip
import io
import lzma
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from treg_megatron.errors import UserError

PARQUET, ARROW_FILE, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
#: what reading a damaged file raises
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)

_HEAD = 1 << 16
_BUFFER = 1 << 20
_SPACE_AND_BOM = b" \t\r\n\xef\xbb\xbf"
_GZIP, _ZSTD, _BZ2, _XZ = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ\0"
_TAR = slice(257, 262)

_UNPACK = "unpack it and give what is in it"
_EXPORT = "save its rows as JSONL or Parquet"
_FOREIGN = (
    (re.compile(rb"PK(\x03\x04|\x05\x06)"), "a zip archive", _UNPACK),
    (re.compile(rb"7z\xbc\xaf\x27\x1c"), "a 7z archive", _UNPACK),
    (re.compile(rb"Rar!"), "a rar archive", _UNPACK),
    (re.compile(rb"\x04\x22\x4d\x18"), "compressed by lz4", "decompress it, or use gzip or zstd"),
    (re.compile(rb"\xff\x06\0\0sNaPpY"), "compressed by snappy", "decompress it, or use gzip or zstd"),
    (re.compile(rb"\x80[\x02-\x05]"), "a pickle, which could run code on loading", _EXPORT),
    (re.compile(rb"\x89HDF"), "an HDF5 file", _EXPORT),
    (re.compile(rb"\x93NUMPY"), "a NumPy array", _EXPORT),
    (re.compile(rb"SQLite format 3"), "an SQLite database", _EXPORT),
    (re.compile(rb"Obj\x01"), "an Avro file", _EXPORT),
    (re.compile(rb"ORC"), "an ORC file", _EXPORT),
    (re.compile(rb"%PDF"), "a PDF", _EXPORT),
    (re.compile(rb".{7}\0\{", re.DOTALL), "a safetensors file", "give preference pairs, not weights"),
    (re.compile(rb"(\xff\xfe|\xfe\xff)"), "UTF-16 text", "save it as UTF-8, as by iconv -f UTF-16 -t UTF-8"),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer instead of the file", "run git lfs pull"),
    (re.compile(rb"\s*<(!doctype|html)", re.IGNORECASE), "a web page", "download the file itself"),
    (re.compile(rb"(PAR1|ARROW1)"), "compressed Parquet or Arrow", "decompress it"),
    (re.compile(rb"(\x1f\x8b|\x28\xb5\x2f\xfd|BZh\d|\xfd7zXZ)"), "compressed twice", "decompress it once"),
)
_ZIPPED = (
    (re.compile(r"(^|/)data\.pkl$"), "a file that torch.save wrote", _EXPORT),
    (re.compile(r"\.npy$"), "a NumPy archive", _EXPORT),
    (re.compile(r"^xl/"), "an Excel workbook", "save it as CSV"),
)


def head_of(path: Path) -> bytes:
    """The first bytes of a file as they are on disk.

    Raises:
        UserError: the file cannot be read.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or device, which cannot be read twice: write it to a file first"
        raise UserError(f"{path} is {kind}")
    try:
        with open(path, "rb") as stream:
            return stream.read(16)
    except OSError as error:
        looks_like_a_name = re.fullmatch(r"[\w-]+/[\w-]+", str(path))
        hint = "; a hub dataset is written hub:OWNER/NAME" if looks_like_a_name else ""
        raise UserError(f"pairs file {path} cannot be read: {error.strerror}{hint}") from None


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading; compression by gzip, zstd, bz2 or xz is undone."""
    head = head_of(path)
    raw: Any
    if head.startswith(_GZIP):
        raw = gzip.open(path)
    elif head.startswith(_BZ2):
        raw = bz2.open(path)
    elif head.startswith(_XZ):
        raw = lzma.open(path)
    elif head.startswith(_ZSTD):
        import pyarrow as pa

        raw = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    else:
        return open(path, "rb", buffering=_BUFFER)
    return io.BufferedReader(raw, _BUFFER)


def is_compressed(path: Path) -> bool:
    """Whether :func:`open_bytes` undoes a compression of the file."""
    return head_of(path).startswith((_GZIP, _BZ2, _XZ, _ZSTD))


def text_beginning(path: Path) -> bytes:
    """The beginning of a text file, without byte-order mark and white space before it; empty if nothing else is there.

    Raises:
        UserError: the file is not text; the message names what it is, and what to do.
    """
    with open_bytes(path) as stream:
        head = stream.read(_HEAD)
        _refuse_foreign(path, head)
        while head and not head.strip(_SPACE_AND_BOM):
            head = stream.read(_HEAD)
    return head.lstrip(_SPACE_AND_BOM)


def _refuse_foreign(path: Path, head: bytes) -> None:
    for pattern, what, to_do in _FOREIGN:
        if pattern.match(head):
            for inside, zipped, instead in _ZIPPED:
                if what == "a zip archive" and any(inside.search(name) for name in _zip_names(path)):
                    what, to_do = zipped, instead
            raise UserError(f"{path} is {what}: {to_do}")
    if head[_TAR] == b"ustar":
        raise UserError(f"{path} is a tar archive: {_UNPACK}")
    if b"\0" in head and head.lstrip(_SPACE_AND_BOM)[:1] not in (b"{", b"["):
        raise UserError(f"{path} is binary data of an unknown kind: {_EXPORT}")


def _zip_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile, NotImplementedError):
        return []
