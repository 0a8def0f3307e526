"""Streaming reader of the records of a data file of any size, and the file's identity.

    JSON, JSONL         plain, or compressed by gzip or zstd; detected by magic bytes, not by file name
    Parquet             one file, or a folder of them
    Arrow               a folder written by ``datasets``' ``save_to_disk``
    hub:NAME            a dataset on the Hugging Face hub: ``hub:OWNER/NAME``, ``hub:OWNER/NAME@REVISION:SPLIT``

Only the last needs the ``datasets`` package and network access.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from treg_megatron.errors import UserError
from treg_megatron.utils.files import natural_order, sha256_of, sha256_of_json

HUB = "hub:"

_CHUNK = 1 << 20  # characters read at once; a longer row takes several reads
_LONGEST_TOKEN = 16  # longest JSON literal, number tail or escape that the end of a chunk may cut
_SPACE = " \t\n\r"
_ROWS_AT_ONCE = 512
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # Arrow's
_HUB_NAME = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^:]+))?(:(?P<split>[\w.-]+))?")


def read_rows(source: str | Path) -> Iterator[tuple[int, Any]]:
    """Numbered records of a file, folder or hub dataset, in order.

    Numbers start at 1. In JSONL they are line numbers; in a folder they count over all its files.

    Raises:
        UserError: the source is missing, of an unsupported kind, or damaged; the message names file and row.
    """
    if str(source).startswith(HUB):
        return enumerate(_load_from_hub(str(source)), start=1)
    path = Path(source)
    if path.is_dir():
        return _folder_rows(path)
    if is_parquet(path):
        return _numbered(path, [path], _parquet_tables)
    return _text_rows(path)


def is_parquet(path: Path) -> bool:
    """Whether a file begins with the magic bytes of Parquet."""
    return _magic(path) == _PARQUET


def source_identity(source: str | Path) -> dict[str, str]:
    """Identity of an input: name and hash of a file or folder, or name and fingerprint of a hub dataset.

    Raises:
        UserError: as :func:`read_rows`.
    """
    if str(source).startswith(HUB):
        return {"file": str(source), "sha256": _load_from_hub(str(source))._fingerprint}
    path = Path(source)
    if path.is_dir():
        return {
            "file": path.name,
            "sha256": sha256_of_json(
                {str(file.relative_to(path)): sha256_of(file) for file in sorted(path.rglob("*")) if file.is_file()}
            ),
        }
    try:
        return {"file": path.name, "sha256": sha256_of(path)}
    except OSError as error:
        raise UserError(f"pairs file {path} cannot be read: {error.strerror}") from None


# -- Parquet, Arrow, hub -----------------------------------------------------------------------------------------------


def _folder_rows(folder: Path) -> Iterator[tuple[int, Any]]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise UserError(
            f"{folder} holds the splits {', '.join(splits)}: name one of them, such as {folder / splits[0]}"
            if splits
            else f"{folder} names splits that do not exist"
        )
    if (folder / "state.json").is_file():
        try:
            names = [file["filename"] for file in json.loads((folder / "state.json").read_bytes())["_data_files"]]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{folder / 'state.json'} is not what save_to_disk writes: {error!r}") from None
        return _numbered(folder, [folder / name for name in names], _arrow_tables)
    files = sorted(folder.glob("*.parquet"), key=natural_order)
    if not files:
        raise UserError(f"{folder} holds neither .parquet files nor a dataset that save_to_disk wrote")
    return _numbered(folder, files, _parquet_tables)


def _numbered(source: Path, files: list[Path], tables) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa

    number, file = 0, source
    try:
        for file in files:
            for table in tables(file):
                for row in table.to_pylist():
                    number += 1
                    yield number, row
    except UnicodeDecodeError as error:
        raise UserError(f"{file} after row {number}: text that is not UTF-8 ({error.reason})") from None
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a duplicate column, a date out of range
        raise UserError(f"{file} cannot be read after row {number}: {error}") from None


def _parquet_tables(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    file, rows = pq.ParquetFile(path, page_checksum_verification=True), 0
    for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
        rows += batch.num_rows
        yield batch
    if rows != file.metadata.num_rows:  # a damaged page can look like a page type that readers skip
        raise ValueError(f"{file.metadata.num_rows} rows expected from the metadata: the file is damaged")


def _arrow_tables(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
        for batch in batches:
            batch.validate(full=True)  # offsets of a damaged file could point outside the file
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield batch.slice(start, _ROWS_AT_ONCE)
        end = source.tell()
        source.seek(max(end - len(_END_OF_STREAM), 0))
        if source.read() != _END_OF_STREAM:  # readers treat truncation, or zeros instead of a length, as the end
            raise ValueError(f"the stream ends at byte {end}, the file is damaged")


def _load_from_hub(source: str) -> Any:
    name = _HUB_NAME.fullmatch(source)
    if name is None:
        raise UserError(f"{source} is not of the form hub:OWNER/NAME or hub:OWNER/NAME@REVISION:SPLIT")
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source} needs the package `datasets`: pip install 'datasets<5'") from None
    split = name["split"] or "train"
    try:
        return datasets.load_dataset(name["name"], revision=name["revision"], split=split)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source}, split {split}, cannot be loaded: {type(error).__name__}: {reason}") from None


# -- JSON and JSONL ----------------------------------------------------------------------------------------------------


def _magic(path: Path) -> bytes:
    try:
        with open(path, "rb") as stream:
            return stream.read(4)
    except OSError as error:
        looks_like_a_name = re.fullmatch(r"[\w-]+/[\w-]+", str(path))
        hint = f"; a hub dataset is written {HUB}OWNER/NAME" if looks_like_a_name else ""
        raise UserError(f"pairs file {path} cannot be read: {error.strerror}{hint}") from None


def _open_text(path: Path) -> io.TextIOWrapper:
    magic = _magic(path)
    if magic.startswith(_GZIP):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    if magic == _ZSTD:
        import pyarrow as pa

        return io.TextIOWrapper(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


def _text_rows(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        is_array = _first_character(path) == "["
        with _open_text(path) as stream:
            if is_array:
                while stream.read(1) != "[":
                    pass
            for number, row in (_array_elements if is_array else _json_lines)(stream, path):
                yield number, row
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text after row {number}: {error.reason}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read after row {number}: {error}") from None


def _first_character(path: Path) -> str:
    with _open_text(path) as stream:
        while (first := stream.read(1)) and first in _SPACE:
            pass
        return first


def _json_lines(stream: TextIO, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, start=1):
        if line.strip(_SPACE):
            try:
                yield number, json.loads(line.strip("\ufeff"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} row {number} does not parse as JSON: {error}") from None


def _array_elements(stream: TextIO, path: Path) -> Iterator[tuple[int, Any]]:
    """Elements of the JSON array whose ``[`` was just read, one by one: memory holds one chunk or one element."""
    text = _Lookahead(stream)
    if text.skip_space() == "]":
        text.position += 1
    else:
        number = 0
        while True:
            number += 1
            try:
                value = text.decode()
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} row {number} does not parse as JSON: {error}") from None
            yield number, value
            after = text.skip_space()
            text.position += 1
            if after == "]":
                break
            if after != ",":
                raise UserError(
                    f"{path} row {number} is not followed by ',' or ']' but by "
                    f"{repr(after) if after else 'the end of the file: it is cut off'}"
                )
            text.skip_space()
    if extra := text.skip_space():
        raise UserError(f"{path}: {extra!r} follows the closing ']' of the array")


class _Lookahead:
    """The part of a text stream around the next JSON value."""

    def __init__(self, stream: TextIO):
        self.stream, self.text, self.position, self.ended = stream, "", 0, False
        self.decoder = json.JSONDecoder()

    def read_more(self) -> None:
        more = self.stream.read(max(_CHUNK, len(self.text) - self.position))
        self.text, self.position = self.text[self.position :] + more, 0
        self.ended = not more

    def skip_space(self) -> str:
        """The next non-whitespace character, without consuming it; empty at the end of the stream."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in _SPACE:
                    return self.text[self.position]
                self.position += 1
            if self.ended:
                return ""
            self.read_more()

    def decode(self) -> Any:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
                if end < len(self.text) or self.ended:  # a number may continue in the next chunk
                    self.position = end
                    return value
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos + _LONGEST_TOKEN > len(self.text)
                if self.ended or not cut_off:
                    raise ValueError(error.msg) from None
            self.read_more()
