"""Hugging Face folder to Megatron checkpoint, tensor by tensor: no model is built and memory holds one parameter."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import treg_megatron
from treg_megatron.checkpoint.buffers import ReusableBuffer
from treg_megatron.checkpoint.layout import (
    MODEL_PREFIX,
    WEIGHTS,
    CheckpointMetadata,
    fingerprints,
    require_whole_export,
    write_metadata,
)
from treg_megatron.checkpoint.safetensors_stream import DTYPES, StoredTensor, tensors_in_folder
from treg_megatron.checkpoint.torch_dist import TorchDistWriter
from treg_megatron.errors import UserError
from treg_megatron.models.families import (
    OUTPUT_LAYER,
    Family,
    Parameter,
    checkpoint_key,
    family_of,
    in_model_order,
    interleaving,
    model_fields,
    parameter_shape,
    places,
    source_shape,
    stacked_shape,
    stacking,
)
from treg_megatron.utils.files import atomic_folder, read_json


def import_checkpoint(hf: str | Path, output: str | Path, progress: bool = False) -> CheckpointMetadata:
    """Write the model of a Hugging Face folder as a Megatron checkpoint that loads at any TP x PP.

    Values keep their precision bit for bit; the vocabulary is stored without padding (Megatron-core pads on loading).

    Raises:
        UserError: the folder or the architecture cannot be used, config.json and weights disagree, ``output`` exists,
            or the disk is too small. Nothing is left behind.
    """
    hf, output = Path(hf), Path(output)
    if not hf.is_dir():
        raise UserError(f"Hugging Face folder {hf} does not exist")
    require_whole_export(hf)
    hf_config = read_json(hf / "config.json")
    family, fields = family_of(hf_config), model_fields(hf_config)
    stored = model_tensors(tensors_in_folder(hf), family, fields, hf)
    dtype = common_dtype(stored, hf)
    identity = CheckpointMetadata(
        family=family.architecture,
        hf_config=hf_config,
        dtype=str(dtype).removeprefix("torch."),
        source=str(hf.resolve()),
        written_by=f"treg-megatron {treg_megatron.__version__} import",
    )

    nbytes = sum(tensor.nbytes for tensor in stored.values())
    with atomic_folder(output, nbytes) as folder:
        weights = folder / WEIGHTS
        weights.mkdir()
        with (
            TorchDistWriter(weights) as writer,
            tqdm(total=nbytes, desc="import", unit="B", unit_scale=True, disable=not progress) as bar,
        ):
            copier = _ParameterCopier(stored, dtype, fields, writer, bar)
            for parameter, place in in_model_order(family, fields):
                copier.copy(parameter, place)
            _write_extra_state(writer, family, fields)
        identity = dataclasses.replace(identity, files=fingerprints(folder))
        write_metadata(folder, identity)
    return identity


class _ParameterCopier:
    """Copies one parameter after another from a Hugging Face folder into a checkpoint."""

    def __init__(
        self,
        stored: dict[str, StoredTensor],
        dtype: torch.dtype,
        fields: dict[str, Any],
        writer: TorchDistWriter,
        bar: tqdm,
    ) -> None:
        self._stored, self._dtype, self._fields, self._writer, self._bar = stored, dtype, fields, writer, bar
        self._source, self._merged = ReusableBuffer(), ReusableBuffer()

    def copy(self, parameter: Parameter, place: tuple[int, ...]) -> None:
        """Copy one parameter (of one layer, of one expert)."""
        if parameter.groups is None:
            row = 0
            for source in parameter.sources:
                tensor = self._read(source.at(place), source_shape(source, self._fields))
                self._write(parameter, tensor, row, place)
                row += len(tensor)
            return
        merged = self._merged.tensor(parameter_shape(parameter, self._fields), self._dtype)
        layout = interleaving(parameter, self._fields)
        for index, source in enumerate(parameter.sources):
            view = layout.part(merged, index)
            view.copy_(self._read(source.at(place), source_shape(source, self._fields)).view(view.shape))
        self._write(parameter, merged, 0, place)

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self._source.tensor(shape, self._dtype)
        self._stored[name].read_into(tensor)
        self._bar.update(tensor.nbytes)
        return tensor

    def _write(self, parameter: Parameter, chunk: torch.Tensor, row: int, place: tuple[int, ...]) -> None:
        offsets = (*place, row, *(0 for _ in chunk.shape[1:]))
        self._writer.write_chunk(
            MODEL_PREFIX + parameter.key,
            chunk.view(*(1 for _ in place), *chunk.shape),
            offsets,
            stacked_shape(parameter, self._fields),
        )


def _write_extra_state(writer: TorchDistWriter, family: Family, fields: dict[str, Any]) -> None:
    for module in family.extra_state_modules():
        key = MODEL_PREFIX + checkpoint_key(module) + "._extra_state"
        shape = tuple(fields[f] for f in stacking(module))
        for place in places(module, fields):
            writer.write_object(key, None, place or (0,), shape or (1,))


def model_tensors(
    stored: dict[str, StoredTensor], family: Family, fields: dict[str, Any], folder: Path
) -> dict[str, StoredTensor]:
    """The tensors of a folder that are the model's weights, checked against its config.json.

    Raises:
        UserError: a tensor is missing, has another shape, or is not part of the architecture.
    """
    expected = {
        source.at(place): source_shape(source, fields)
        for parameter, place in in_model_order(family, fields)
        for source in parameter.sources
    }
    for name, shape in expected.items():
        if name not in stored:
            raise UserError(f"{folder} lacks tensor {name}, which its config.json calls for")
        if stored[name].shape != shape:
            raise UserError(f"{folder}: {name} has shape {list(stored[name].shape)}, config.json says {list(shape)}")
    # a tied model may store its output layer a second time: transformers ignores it, and so do we
    ignored = {s.name for s in OUTPUT_LAYER.sources} if fields["share_embeddings_and_output_weights"] else set()
    extra = [
        name
        for name in stored
        if name not in expected and name not in ignored and not name.endswith(family.ignored_suffixes)
    ]
    if extra:
        raise UserError(
            f"{folder} has tensor {extra[0]}, which is not part of a {family.architecture} with this config.json"
        )
    return {name: stored[name] for name in expected}


def common_dtype(stored: dict[str, StoredTensor], folder: Path) -> torch.dtype:
    """The one precision of a folder's weights.

    Raises:
        UserError: several precisions, or one that is not a plain floating-point format.
    """
    codes = {tensor.dtype for tensor in stored.values()}
    if len(codes) > 1:
        raise UserError(f"{folder} mixes {' and '.join(sorted(codes))}; save the model in one precision first")
    code = codes.pop()
    if code not in DTYPES:
        raise UserError(f"{folder} has {code} weights; known: {', '.join(DTYPES)}")
    return DTYPES[code]
