"""Import of a Hugging Face folder as a Megatron checkpoint, one parameter in memory at a time; no model is built."""

import dataclasses
import logging
from collections import Counter
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
from treg_megatron.checkpoint.safetensors_stream import DTYPES, StoredTensor, same_bytes, tensors_in_folder
from treg_megatron.checkpoint.torch_dist import TorchDistWriter
from treg_megatron.errors import UserError
from treg_megatron.models.families import (
    EMBEDDING,
    OUTPUT_LAYER,
    Family,
    Parameter,
    block_rows,
    checkpoint_key,
    family_of,
    in_model_order,
    model_fields,
    parameter_shape,
    source_shape,
    source_views,
    stacked_indices,
    stacked_shape,
    stacking,
)
from treg_megatron.tokenizer.model_folder import model_folder, require_embeddings, tokens_in_folder
from treg_megatron.utils.files import atomic_folder, read_json

logger = logging.getLogger(__name__)


def import_checkpoint(hf: str | Path, output: str | Path, progress: bool = False) -> CheckpointMetadata:
    """Write the model of a Hugging Face folder as a Megatron checkpoint that loads at any TP and PP size.

    Weights keep their values and precision; the vocabulary is stored without padding (Megatron-core pads on loading).

    Raises:
        UserError: the folder or its architecture is not supported, config.json and weights disagree, ``output`` exists,
            or the disk is too small. Nothing is left behind.
    """
    hf, output = model_folder(hf), Path(output)
    require_whole_export(hf)
    hf_config = read_json(hf / "config.json")
    family, fields = family_of(hf_config), model_fields(hf_config)
    stored = model_tensors(tensors_in_folder(hf), family, fields, hf)
    require_embeddings(tokens_in_folder(hf), fields["vocab_size"], hf)
    dtype, other_dtypes = precisions(stored, family, fields, hf)
    identity = CheckpointMetadata(
        family=family.architecture,
        hf_config=hf_config,
        dtype=name_of(dtype),
        other_dtypes={key: name_of(other) for key, other in other_dtypes.items()},
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
            copier = _ParameterCopier(stored, fields, writer, bar)
            for parameter, index in in_model_order(family, fields):
                copier.copy(parameter, index)
            _write_extra_state(writer, family, fields)
        identity = dataclasses.replace(identity, files=fingerprints(folder))
        write_metadata(folder, identity)
    return identity


class _ParameterCopier:
    """Copies parameters from a Hugging Face folder to a checkpoint, one at a time."""

    def __init__(
        self,
        stored: dict[str, StoredTensor],
        fields: dict[str, Any],
        writer: TorchDistWriter,
        bar: tqdm,
    ) -> None:
        self._stored, self._fields, self._writer, self._bar = stored, fields, writer, bar
        self._source, self._merged = ReusableBuffer(), ReusableBuffer()

    def copy(self, parameter: Parameter, index: tuple[int, ...]) -> None:
        """Copy a parameter of one layer (and expert)."""
        if parameter.groups is None:
            row = 0
            for source in parameter.sources:
                tensor = self._read(source.at(index), source_shape(source, self._fields))
                self._write(parameter, tensor, row, index)
                row += len(tensor)
            return
        dtype = DTYPES[self._stored[parameter.sources[0].at(index)].dtype]
        merged = self._merged.tensor(parameter_shape(parameter, self._fields), dtype)
        for source, views in zip(parameter.sources, source_views(parameter, merged, self._fields), strict=True):
            tensor = self._read(source.at(index), source_shape(source, self._fields))
            for view, block in zip(views, tensor.split(block_rows(source, self._fields)), strict=True):
                view.copy_(block.view(view.shape))
        self._write(parameter, merged, 0, index)

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = self._source.tensor(shape, DTYPES[self._stored[name].dtype])
        self._stored[name].read_into(tensor)
        self._bar.update(tensor.nbytes)
        return tensor

    def _write(self, parameter: Parameter, chunk: torch.Tensor, row: int, index: tuple[int, ...]) -> None:
        offsets = (*index, row, *(0 for _ in chunk.shape[1:]))
        self._writer.write_chunk(
            MODEL_PREFIX + parameter.key,
            chunk.view(*(1 for _ in index), *chunk.shape),
            offsets,
            stacked_shape(parameter, self._fields),
        )


def _write_extra_state(writer: TorchDistWriter, family: Family, fields: dict[str, Any]) -> None:
    for module in family.extra_state_modules():
        key = MODEL_PREFIX + checkpoint_key(module) + "._extra_state"
        shape = tuple(fields[f] for f in stacking(module))
        for index in stacked_indices(module, fields):
            writer.write_object(key, None, index or (0,), shape or (1,))


def model_tensors(
    stored: dict[str, StoredTensor], family: Family, fields: dict[str, Any], folder: Path
) -> dict[str, StoredTensor]:
    """The model's weights among the tensors of a folder, checked against its config.json.

    Raises:
        UserError: a tensor is missing, has the wrong shape, has a dtype other than those of :data:`DTYPES`, is not part
            of the architecture, or is the output layer of a tied model and differs from its embedding.
    """
    expected = {
        source.at(index): source_shape(source, fields)
        for parameter, index in in_model_order(family, fields)
        for source in parameter.sources
    }
    for name, shape in expected.items():
        if name not in stored:
            tied = name == OUTPUT_LAYER.sources[0].name
            hint = "; if the embeddings are tied, set tie_word_embeddings to true" if tied else ""
            raise UserError(f"{folder} lacks tensor {name}, which its config.json calls for{hint}")
        if stored[name].shape != shape:
            raise UserError(f"{folder}: {name} has shape {list(stored[name].shape)}, config.json says {list(shape)}")
        if stored[name].dtype not in DTYPES:
            raise UserError(
                f"{folder} has {stored[name].dtype} weights ({name}); known: {', '.join(DTYPES)}: start from the "
                "model before it was quantized"
            )
    if fields["share_embeddings_and_output_weights"]:
        stored = without_tied_copy(stored, folder)
    extra = [name for name in stored if name not in expected]
    if extra:
        raise UserError(
            f"{folder} has tensor {extra[0]}, which is not part of a {family.architecture} with this config.json"
        )
    return {name: stored[name] for name in expected}


def without_tied_copy(stored: dict[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a model with tied embeddings, without the output layer that some folders store as well.

    Raises:
        UserError: output layer and embedding differ. Transformers 4 would drop the former, transformers 5 untie them.
    """
    (embedding,), (head,) = EMBEDDING.sources, OUTPUT_LAYER.sources
    if head.name in stored and embedding.name in stored:
        if not same_bytes(stored[embedding.name], stored[head.name]):
            raise UserError(
                f"{folder}: config.json ties the embeddings, but {head.name} is not {embedding.name}: set "
                f"tie_word_embeddings to false if the model has both, or delete {head.name}"
            )
    return {name: tensor for name, tensor in stored.items() if name != head.name}


def precisions(
    stored: dict[str, StoredTensor], family: Family, fields: dict[str, Any], folder: Path
) -> tuple[torch.dtype, dict[str, torch.dtype]]:
    """The precision of most of a folder's weights, and by key the parameters with a different one, such as fp32 norms.

    Raises:
        UserError: a parameter's tensors, which share one tensor of the checkpoint, differ in precision.
    """
    found: dict[str, torch.dtype] = {}
    nbytes: Counter[torch.dtype] = Counter()
    for parameter, index in in_model_order(family, fields):
        for source in parameter.sources:
            tensor = stored[source.at(index)]
            dtype = DTYPES[tensor.dtype]
            nbytes[dtype] += tensor.nbytes
            if found.setdefault(parameter.key, dtype) != dtype:
                raise UserError(
                    f"{folder} mixes {name_of(found[parameter.key])} and {name_of(dtype)}, the latter in "
                    f"{source.at(index)}: tensors of one kind need one precision in all layers; save them in one first"
                )
    ((common, _),) = nbytes.most_common(1)
    others = {key: dtype for key, dtype in found.items() if dtype != common}
    if others:
        logger.info(
            "%s is %s, except for %s: kept as it is",
            folder,
            name_of(common),
            ", ".join(f"{key} ({name_of(dtype)})" for key, dtype in others.items()),
        )
    return common, others


def name_of(dtype: torch.dtype) -> str:
    """A precision's name as in config.json."""
    return str(dtype).removeprefix("torch.")
