"""Bitwise comparison of the weights of two models, each a Hugging Face folder or a Megatron checkpoint.

A checkpoint is compared as the folder that an export would write, without writing it. One tensor of each model is in
memory at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from treg_megatron.checkpoint.buffers import ByteRange, ReusableBuffer, as_bytes, read_into
from treg_megatron.checkpoint.from_hf import without_tied_copy
from treg_megatron.checkpoint.layout import WEIGHTS, find_checkpoint, is_checkpoint, read_metadata, require_whole_export
from treg_megatron.checkpoint.safetensors_stream import DTYPES, PlannedTensor, StoredTensor, tensors_in_folder
from treg_megatron.checkpoint.to_hf import check_tensors, exported_tensors, planned_tensors
from treg_megatron.checkpoint.torch_dist import TorchDistReader
from treg_megatron.errors import UserError
from treg_megatron.models.families import family_of, model_fields
from treg_megatron.utils.files import read_json


@dataclass(frozen=True)
class Comparison:
    """Result of a comparison.

    Attributes:
        tensors, nbytes: number and size of the first model's tensors.
        different: names of tensors that only one model has, or that differ in shape, precision or value.
    """

    tensors: int
    nbytes: int
    different: list[str]


def compare(a: Path, b: Path) -> Comparison:
    """Compare the weights of two models.

    If one is a checkpoint and the other a folder, the checkpoint is compared in the folder's precision, the one it
    would be exported in.

    Raises:
        UserError: one of them is not a model, or is damaged.
    """
    if is_checkpoint(b) and not is_checkpoint(a):
        a, b = b, a
    theirs = _CheckpointWeights(b) if is_checkpoint(b) else _FolderWeights(b)
    if is_checkpoint(a):
        ours = _CheckpointWeights(a, None if is_checkpoint(b) else theirs.dtypes())
    else:
        ours = _FolderWeights(a)
    planned, others = ours.planned(), {tensor.name: tensor for tensor in theirs.planned()}
    different = [tensor.name for tensor in planned if others.get(tensor.name) != tensor]
    different += sorted(others.keys() - {tensor.name for tensor in planned})
    if not different:
        left, right = ReusableBuffer(), ReusableBuffer()
        names = [tensor.name for tensor in planned]
        for tensor, mine, other in zip(planned, ours.read(names), theirs.read(names), strict=True):
            if not torch.equal(_filled(left, mine, tensor.nbytes), _filled(right, other, tensor.nbytes)):
                different.append(tensor.name)
    return Comparison(len(planned), sum(tensor.nbytes for tensor in planned), different)


class _FolderWeights:
    """Weights of a Hugging Face folder of any architecture."""

    def __init__(self, folder: Path) -> None:
        require_whole_export(folder)
        self._stored: dict[str, StoredTensor] = tensors_in_folder(folder)
        if _is_tied(folder):
            self._stored = without_tied_copy(self._stored, folder)
        unknown = {tensor.dtype for tensor in self._stored.values()} - DTYPES.keys()
        if unknown:
            raise UserError(f"{folder} has {unknown.pop()} weights; supported: {', '.join(DTYPES)}")

    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: DTYPES[tensor.dtype] for name, tensor in self._stored.items()}

    def planned(self) -> list[PlannedTensor]:
        return [PlannedTensor(name, tensor.shape, DTYPES[tensor.dtype]) for name, tensor in self._stored.items()]

    def read(self, names: list[str]) -> Iterator[list[ByteRange]]:
        return ([ByteRange(t.file, t.start, t.nbytes)] for t in (self._stored[name] for name in names))


class _CheckpointWeights:
    """Weights of a Megatron checkpoint, under their Hugging Face names."""

    def __init__(self, folder: Path, like: dict[str, torch.dtype] | None = None) -> None:
        """``like``: the precision of each tensor of the folder that it is compared with; None: its own."""
        checkpoint = find_checkpoint(folder)
        identity = read_metadata(checkpoint)
        self._family, self._fields = family_of(identity.hf_config), model_fields(identity.hf_config)
        self._reader = TorchDistReader(checkpoint / WEIGHTS)
        check_tensors(self._reader, self._family, self._fields, checkpoint)
        self._dtype = getattr(torch, identity.dtype)
        self._others = {key: getattr(torch, other) for key, other in identity.other_dtypes.items()}
        if like:
            self._others = {
                parameter.key: like.get(parameter.sources[0].at((0,) * len(parameter.stacking)), self._dtype)
                for parameter in self._family.parameters(self._fields)
            }

    def planned(self) -> list[PlannedTensor]:
        return planned_tensors(self._family, self._fields, self._dtype, self._others)

    def read(self, names: list[str]) -> Iterator[list[memoryview | ByteRange]]:
        """The tensors in the family's order, which equals ``names`` if both sides are checkpoints of one model."""
        return exported_tensors(self._reader, self._family, self._fields, self._dtype, self._others)


def _is_tied(folder: Path) -> bool:
    path = folder / "config.json"
    if not path.is_file():
        return False
    config = read_json(path)
    try:
        return model_fields(config)["share_embeddings_and_output_weights"]
    except UserError:  # another architecture: its default is not known here
        return bool(config.get("tie_word_embeddings"))


def _filled(scratch: ReusableBuffer, pieces: list[memoryview | ByteRange], nbytes: int) -> torch.Tensor:
    whole, at = scratch.tensor((nbytes,), torch.uint8), 0
    for piece in pieces:
        length = piece.nbytes
        if isinstance(piece, ByteRange):
            read_into(piece.path, piece.start, whole[at : at + length])
        else:
            as_bytes(whole)[at : at + length] = piece
        at += length
    return whole
