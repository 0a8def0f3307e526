"""Reader and writer of Megatron-core's ``torch_dist`` checkpoints, without Megatron-core, in a single process.

On disk such a checkpoint is PyTorch's distributed-checkpoint format (``.metadata``, and ``*.distcp`` files that hold
each chunk as written by ``torch.save``) plus ``metadata.json`` (the format) and ``common.pt`` (what is not sharded).
Chunks are rectangles of a tensor, so any tensor- and pipeline-parallel layout can read what any other has written. One
chunk is in memory at a time.
"""

import json
import math
import os
import pickle
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from treg_megatron.checkpoint.buffers import ByteRange, OutputFile, ReusableBuffer, read_into
from treg_megatron.errors import UserError

METADATA = ".metadata"
COMMON = "common.pt"
FORMAT = "metadata.json"
TORCH_DIST = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

# The content metadata that NeMo passes for its own checkpoints: layers stacked along axis 0, no optimizer.
CONTENT_METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}

DATA_FILE_BYTES = 5_000_000_000


class TorchDistWriter:
    """Writer of a checkpoint into an empty folder, chunk by chunk.

    A context manager; the checkpoint is complete once it has exited without an exception.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metadata = Metadata(state_dict_metadata={}, planner_data={}, storage_data={})
        self._files = 0
        self._file: OutputFile | None = None

    def __enter__(self) -> "TorchDistWriter":
        # torch.load does not verify the checksums, and computing them takes longer than writing
        self._crc32 = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        return self

    def __exit__(self, exception_type: type | None, *_) -> None:
        torch.serialization.set_crc32_options(self._crc32)
        if self._file:
            self._file.close()
        if exception_type is None:
            torch.save({"content_metadata": CONTENT_METADATA}, self._folder / COMMON)
            (self._folder / FORMAT).write_text(json.dumps(TORCH_DIST))
            (self._folder / METADATA).write_bytes(pickle.dumps(self._metadata))

    def write_chunk(self, key: str, chunk: torch.Tensor, offsets: tuple[int, ...], shape: tuple[int, ...]) -> None:
        """Write the rectangle of tensor ``key`` that begins at ``offsets``.

        Args:
            chunk: a contiguous CPU tensor of any dtype whose storage has exactly its size.
            offsets: index of the chunk's first element in the whole tensor.
            shape: of the whole tensor.
        """
        entry = self._metadata.state_dict_metadata.setdefault(
            key, TensorStorageMetadata(TensorProperties(chunk.dtype), torch.Size(shape), [])
        )
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), chunk.shape))
        self._append(MetadataIndex(key, torch.Size(offsets)), chunk)

    def write_object(self, key: str, value: Any, index: tuple[int, ...], shape: tuple[int, ...]) -> None:
        """Write the item at ``index`` of a sharded object of ``shape`` items, e.g. one layer's FP8 state."""
        unique_key = f"{key}/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, shape))}"
        self._metadata.state_dict_metadata[unique_key] = BytesStorageMetadata()
        self._append(MetadataIndex(unique_key), [value])

    def _append(self, index: MetadataIndex, value: Any) -> None:
        if self._file is None or self._file.tell() >= DATA_FILE_BYTES:
            if self._file:
                self._file.close()
            self._file = OutputFile(self._folder / f"__0_{self._files}.distcp")
            self._files += 1
        start = self._file.tell()
        torch.save(value, self._file)
        self._metadata.storage_data[index] = _StorageInfo(
            os.path.basename(self._file.name), start, self._file.tell() - start
        )


class TorchDistReader:
    """Reader of the tensors of a checkpoint, whatever parallel layout has written it."""

    def __init__(self, folder: Path) -> None:
        """Read only the metadata.

        Raises:
            UserError: the folder is not a torch_dist checkpoint, or is damaged.
        """
        self._folder = folder
        try:
            backend = json.loads((folder / FORMAT).read_text())["sharded_backend"]
            with open(folder / METADATA, "rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except (OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{folder} is not a readable Megatron checkpoint: {error}") from None
        if backend != TORCH_DIST["sharded_backend"]:
            raise UserError(f"{folder} has format {backend}; only torch_dist can be read")
        self._storage: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self.keys = set(metadata.state_dict_metadata)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._scratch = ReusableBuffer()

    def damage(self) -> str | None:
        """The first file that is missing or shorter than the metadata says, in a few words; None if there is none."""
        ends: dict[str, int] = {}
        for info in self._storage.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in sorted(ends.items()):
            path = self._folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size < end:
                return f"{name} has {path.stat().st_size} bytes, at least {end} were written"
        return None if ends else "it holds no weights"

    def read_into(self, key: str, target: torch.Tensor, index: tuple[int, ...] = ()) -> None:
        """Read a tensor, or one layer (and expert) of a tensor that stacks them on its leading axes.

        Args:
            target: a contiguous CPU tensor of the stored dtype. It may have fewer rows than are stored, for a
                vocabulary without its padding.
            index: of the layer (and expert), on the leading axes.

        Raises:
            UserError: the chunks in the checkpoint do not cover the target, or cannot be read.
        """
        for part in self._parts(key, index, 0, tuple(target.shape)):
            path, start, rows = self._locate(part)
            piece = target[part.in_target]
            in_place = rows.shape == piece.shape and piece.is_contiguous()
            block = piece if in_place else self._scratch.tensor(tuple(rows.shape), rows.dtype)
            read_into(path, start, block)
            if not in_place:
                columns = (slice(None), *part.in_chunk[1:])
                piece.copy_(block[columns])

    def rows_in_files(
        self, key: str, index: tuple[int, ...], first_row: int, shape: tuple[int, ...]
    ) -> list[ByteRange] | None:
        """Byte ranges of ``shape[0]`` rows of a tensor, in order, starting at ``first_row``.

        Returns:
            None if some chunk holds only parts of rows, so that rows are not contiguous in the files.

        Raises:
            UserError: as :meth:`read_into`.
        """
        parts = sorted(self._parts(key, index, first_row, shape), key=lambda part: part.in_target[0].start)
        ranges = []
        for part in parts:
            path, start, rows = self._locate(part)
            if rows.shape[1:] != shape[1:]:
                return None
            ranges.append(ByteRange(path, start, rows.nbytes))
        return ranges

    def _parts(self, key: str, index: tuple[int, ...], first_row: int, shape: tuple[int, ...]) -> list["_Part"]:
        """The chunks that overlap ``shape[0]`` whole rows of a tensor from ``first_row`` on."""
        parts = []
        for chunk in self.tensors[key].chunks:
            if not all(o <= i < o + s for i, o, s in zip(index, chunk.offsets, chunk.sizes, strict=False)):
                continue
            offsets, sizes = chunk.offsets[len(index) :], chunk.sizes[len(index) :]
            offsets = (offsets[0] - first_row, *offsets[1:])
            ranges = [(max(0, o), min(n, o + s)) for o, s, n in zip(offsets, sizes, shape, strict=True)]
            if all(start < stop for start, stop in ranges):
                parts.append(
                    _Part(
                        key,
                        chunk,
                        tuple(i - o for i, o in zip(index, chunk.offsets, strict=False)),
                        tuple(slice(start - o, stop - o) for (start, stop), o in zip(ranges, offsets, strict=True)),
                        tuple(slice(start, stop) for start, stop in ranges),
                    )
                )
        covered = sum(math.prod(s.stop - s.start for s in part.in_target) for part in parts)
        if covered != math.prod(shape):
            raise UserError(f"{self._folder}: {key} is incomplete: it has {covered} of {math.prod(shape)} values")
        return parts

    def _locate(self, part: "_Part") -> tuple[Path, int, torch.Tensor]:
        """File and offset in bytes of the chunk's rows that a part needs, and those rows as a meta tensor."""
        info = self._storage[MetadataIndex(part.key, part.chunk.offsets)]
        path = self._folder / info.relative_path
        if getattr(info, "transform_descriptors", None):
            raise UserError(f"{path}: {part.key} is stored with {info.transform_descriptors}, which is not supported")
        try:
            with open(path, "rb") as file:
                # with the meta device torch.load reads where the values are stored, but not the values
                stored = torch.load(
                    _create_file_view(file, info.offset, info.length), map_location="meta", weights_only=True
                )
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
        if not stored.is_contiguous():
            raise UserError(f"{path}: {part.key} is not stored contiguously, which is not supported")
        where = (*part.index, part.in_chunk[0])
        rows = stored[where]
        start = stored.untyped_storage()._checkpoint_offset + rows.storage_offset() * rows.element_size()
        return path, info.offset + start, rows


@dataclass(frozen=True)
class _Part:
    """Overlap of one chunk with a rectangle that is read.

    Attributes:
        index: of the layer and expert within the chunk.
        in_chunk, in_target: position of the overlap in the chunk and in the rectangle.
    """

    key: str
    chunk: ChunkStorageMetadata
    index: tuple[int, ...]
    in_chunk: tuple[slice, ...]
    in_target: tuple[slice, ...]


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler of ``.metadata`` that imports nothing but the plain data classes it consists of."""

    SAFE = {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("builtins", "set"),
        ("pathlib", "PosixPath"),
        ("pathlib", "Path"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("megatron.core.dist_checkpointing."):
            return _Record
        if (module, name) in self.SAFE:
            return super().find_class(module, name)
        if module.startswith("torch.distributed.checkpoint.") and "." not in name:
            # a dotted name could walk to anything that the module imports, such as os.system
            found = super().find_class(module, name)
            if (
                isinstance(found, type)
                and found.__module__ == module
                and (is_dataclass(found) or issubclass(found, Enum))
            ):
                return found
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"its metadata refers to {module}.{name}, which is not allowed")


class _Record:
    """Stand-in for Megatron-core's subclasses of the metadata classes: attributes without behaviour."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
