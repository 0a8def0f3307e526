"""Streaming reader and writer of safetensors files, one tensor at a time.

The safetensors library memory-maps whole files, or holds a whole shard in memory. A file consists of the length of a
JSON header, the header, and the tensors' bytes.
"""

import json
import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from treg_megatron.checkpoint.buffers import PIECE_BYTES, ByteRange, OutputFile, read_into
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.model_folder import existing_folder
from treg_megatron.utils.files import read_json

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit

# Buffers that a model computes itself; older versions of transformers saved them with the weights.
BUFFERS = re.compile(r"(?:^|[._])(?:inv_freq$|rotary_emb\.|attn\.(?:masked_)?bias$)")

# Prefixes that DDP, peft, torch.compile and FSDP add to the tensor names of a model that they wrap.
WRAPPERS = re.compile(r"^module\.|^base_model\.model\.|(?:^|\.)(?:_orig_mod|_fsdp_wrapped_module)\.")

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Location of a tensor in a safetensors file.

    Attributes:
        dtype: the format's code ("F32", "BF16", ...).
        start, nbytes: byte range in ``file``.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read_into(self, target: torch.Tensor) -> None:
        """Read the tensor into a contiguous CPU tensor of the same shape and dtype.

        Raises:
            UserError: the file is too short.
        """
        read_into(self.file, self.start, target)


@dataclass(frozen=True)
class PlannedTensor:
    """Name, shape and dtype of a tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def tensors_in_folder(folder: Path) -> dict[str, StoredTensor]:
    """The weights of a Hugging Face folder by name, from one file or several shards, without buffers.

    Names of a model saved without its head (``embed_tokens.weight``) get the prefix ``model.``, as in transformers.

    Raises:
        UserError: the folder has no safetensors weights (pickled weights are never loaded) or has them twice, a shard
            is missing, truncated or corrupt, or the model was saved inside a wrapper.
    """
    stored = {name: tensor for name, tensor in _stored_tensors(folder).items() if not BUFFERS.search(name)}
    for name in stored:
        if wrapper := WRAPPERS.search(name):
            raise UserError(
                f"{folder} has tensor {name}: the model was saved inside a wrapper, which put {wrapper[0]} into its "
                "names; save the model inside it, or rename the tensors"
            )
    if "embed_tokens.weight" in stored and not any(name.startswith("model.") for name in stored):
        logger.info("%s holds a model without its head: its tensors get the prefix model.", folder)
        stored = {name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in stored.items()}
    return stored


def _stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if index.is_file():
        tensors = _tensors_of_index(index)
    elif single.is_file():
        tensors = tensors_in_file(single)
    else:
        raise UserError(_why_no_weights(existing_folder(folder)))
    others = sorted({path.name for path in _weight_files(folder)} - {tensor.file.name for tensor in tensors.values()})
    if single.name in others:
        raise UserError(
            f"{folder} has its weights twice, in {single.name} and in the files that {index.name} names, and programs "
            "differ in which they read: delete those that are not meant"
        )
    if others:
        logger.warning("%s: not reading %s, which transformers would not read either", folder, ", ".join(others))
    return tensors


def _tensors_of_index(index: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index} has no weight_map; download it again")
    shards = {name: tensors_in_file(index.with_name(name)) for name in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise UserError(f"{index.with_name(shard)} lacks tensor {name}, which {index.name} places there")
        twice = [other for other, tensors in shards.items() if other != shard and name in tensors]
        if twice:
            raise UserError(f"{index.parent} has tensor {name} twice, in {shard} and in {twice[0]}; download it again")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _why_no_weights(folder: Path) -> str:
    if shards := _weight_files(folder):
        return f"{folder} has {shards[0].name}, but no {INDEX_FILE} that names it; download it again"
    if (folder / "adapter_model.safetensors").exists():
        return f"{folder} holds an adapter (adapter_model.safetensors), not a model: merge it into its base model first"
    pickled = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickled:
        return (
            f"{folder} has only pickled weights ({pickled[0].name}), which can run code when loaded; "
            "save the model as safetensors first"
        )
    return f"{folder} has no {SINGLE_FILE} and no {INDEX_FILE}"


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("model*.safetensors"))


def tensors_in_file(path: Path) -> dict[str, StoredTensor]:
    """All tensors of one safetensors file by name; reads only the header.

    Raises:
        UserError: the file is missing, truncated or not a safetensors file.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; download it again")
    size = path.stat().st_size
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > min(size - 8, MAX_HEADER_BYTES):
            raise UserError(f"{path} is truncated or not a safetensors file; download it again")
        start = 8 + header_bytes
        try:
            header = json.loads(file.read(header_bytes))
            tensors = {
                name: StoredTensor(
                    path,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    start + entry["data_offsets"][0],
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }
            for tensor in tensors.values():
                if not isinstance(tensor.dtype, str) or not all(
                    isinstance(number, int) and number >= 0 for number in (*tensor.shape, tensor.start, tensor.nbytes)
                ):
                    raise ValueError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{path} is not a safetensors file (bad header); download it again") from None
    end = max((t.start + t.nbytes for t in tensors.values()), default=start)
    if end > size:
        raise UserError(f"{path} is truncated: {size} bytes of {end}; download it again")
    for name, tensor in tensors.items():
        dtype = DTYPES.get(tensor.dtype)
        if dtype and math.prod(tensor.shape) * dtype.itemsize != tensor.nbytes:
            raise UserError(f"{path} is corrupt: {name} has {tensor.nbytes} bytes for shape {list(tensor.shape)}")
    return tensors


def same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors are the same bit for bit; reads them piece by piece."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with open(a.file, "rb") as ours, open(b.file, "rb") as theirs:
        ours.seek(a.start)
        theirs.seek(b.start)
        remaining = a.nbytes
        while remaining:
            piece = ours.read(min(PIECE_BYTES, remaining))
            if not piece or piece != theirs.read(len(piece)):
                return False
            remaining -= len(piece)
    return True


def plan_shards(tensors: Iterable[PlannedTensor], shard_bytes: int) -> dict[str, list[PlannedTensor]]:
    """Split tensors, in order, into files of at most ``shard_bytes``; a larger tensor gets a file to itself.

    Returns:
        The tensors of each file by file name, as Hugging Face names them.
    """
    shards: list[list[PlannedTensor]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def index_of(shards: dict[str, list[PlannedTensor]]) -> dict:
    """Content of model.safetensors.index.json."""
    return {
        "metadata": {"total_size": sum(t.nbytes for shard in shards.values() for t in shard)},
        "weight_map": {t.name: name for name, shard in shards.items() for t in shard},
    }


class ShardWriter:
    """Writer of one safetensors file, a context manager; the tensors are declared first and written in that order."""

    def __init__(self, path: Path, tensors: list[PlannedTensor]) -> None:
        self._remaining = list(reversed(tensors))
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers rejects files without it
        offset = 0
        for tensor in tensors:
            header[tensor.name] = {
                "dtype": _CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = OutputFile(path)
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, exception_type: type | None, *_) -> None:
        self._file.close()
        if exception_type is None and self._remaining:
            raise RuntimeError(f"{self._remaining[-1].name} was planned but not written")

    def write(self, name: str, pieces: Iterable[memoryview | ByteRange]) -> None:
        """Append the bytes of the next tensor, in pieces.

        Raises:
            RuntimeError: name or size is not that of the next planned tensor.
        """
        planned = self._remaining.pop()
        written = sum(
            self._file.copy(piece) if isinstance(piece, ByteRange) else self._file.write(piece) for piece in pieces
        )
        if (name, written) != (planned.name, planned.nbytes):
            raise RuntimeError(f"planned {planned}, got {written} bytes of {name}")
