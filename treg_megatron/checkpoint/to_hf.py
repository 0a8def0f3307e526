"""Export of a Megatron checkpoint of any parallel layout as a Hugging Face folder, one parameter at a time."""

import itertools
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from treg_megatron.checkpoint.adapters import adapters_of
from treg_megatron.checkpoint.buffers import ByteRange, ReusableBuffer, as_bytes, copy_within_range
from treg_megatron.checkpoint.from_hf import model_tensors, name_of
from treg_megatron.checkpoint.layout import (
    MODEL_PREFIX,
    WEIGHTS,
    CheckpointMetadata,
    certify_export,
    find_checkpoint,
    read_metadata,
)
from treg_megatron.checkpoint.model_card import model_card
from treg_megatron.checkpoint.safetensors_stream import (
    INDEX_FILE,
    PlannedTensor,
    ShardWriter,
    index_of,
    plan_shards,
    tensors_in_folder,
)
from treg_megatron.checkpoint.torch_dist import TorchDistReader
from treg_megatron.errors import UserError
from treg_megatron.models.families import (
    FREE_FIELDS,
    Family,
    block_rows,
    family_of,
    in_model_order,
    model_fields,
    parameter_shape,
    source_shape,
    source_views,
    stacked_shape,
)
from treg_megatron.tokenizer.chat import load_tokenizer
from treg_megatron.tokenizer.model_folder import model_folder, require_embeddings, tokens_in_folder
from treg_megatron.utils.files import atomic_folder, read_json, refuse_existing

logger = logging.getLogger(__name__)

NO_OTHERS: Mapping[str, torch.dtype] = MappingProxyType({})

SHARD_BYTES = 5_000_000_000  # Hugging Face's own default

# Files besides weights and config.json that are copied unchanged from the base model.
COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "tekken.json",
    "*.tiktoken",
    "sentencepiece*",
    "spiece.model",
    "*processor_config.json",
    "chat_template*",
    "additional_chat_templates",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass(frozen=True)
class Exported:
    """Result of an export: the checkpoint, the precision, and the size and number of the weight files."""

    checkpoint: Path
    dtype: str
    nbytes: int
    files: int


def export_checkpoint(
    checkpoint: str | Path,
    base: str | Path,
    output: str | Path,
    dtype: str = "auto",
    run: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> Exported:
    """Write a checkpoint as a Hugging Face folder that transformers loads.

    Args:
        checkpoint: an imported or a training checkpoint, or a run's folder for its newest complete one. Adapters, if
            it has any, are merged into the weights of ``base``.
        base: Hugging Face folder that provides config.json, tokenizer and chat template.
        output: folder to write.
        dtype: precision of the written weights; "auto" for that of the imported model.
        run: the run that the model card describes; None for what the checkpoint records.
        shard_bytes: maximum size of one weight file.
        progress: show a progress bar.

    Raises:
        UserError: the checkpoint is unfinished, damaged or of another model than ``base``, a value does not fit into
            ``dtype``, ``output`` exists, or the disk is too small. Nothing is left behind.
    """
    base, output = model_folder(base), Path(output)
    refuse_existing(output)
    checkpoint = find_checkpoint(Path(checkpoint))
    identity = read_metadata(checkpoint)
    base_config = read_json(base / "config.json")
    fields = _common_fields(identity, checkpoint, base_config, base)
    family = family_of(base_config)
    reader = TorchDistReader(checkpoint / WEIGHTS)
    low_rank = adapters_of(reader, identity, family, fields, checkpoint)
    if low_rank is None:
        check_tensors(reader, family, fields, checkpoint)
    require_embeddings(tokens_in_folder(base), fields["vocab_size"], base)
    target_dtype = getattr(torch, identity.dtype if dtype == "auto" else dtype)
    others = {key: getattr(torch, other) for key, other in identity.other_dtypes.items()} if dtype == "auto" else {}
    planned = planned_tensors(family, fields, target_dtype, others)
    shards = plan_shards(planned, shard_bytes)
    nbytes = sum(tensor.nbytes for tensor in planned)
    with atomic_folder(output, nbytes) as folder:
        with tqdm(total=nbytes, desc="export", unit="B", unit_scale=True, disable=not progress) as bar:
            sources = (
                exported_tensors(reader, family, fields, target_dtype, others)
                if low_rank is None
                else low_rank.merged_tensors(
                    model_tensors(tensors_in_folder(base), family, fields, base), target_dtype, others
                )
            )
            for name, shard in shards.items():
                with ShardWriter(folder / name, shard) as writer:
                    for tensor in shard:
                        writer.write(tensor.name, next(sources))
                        bar.update(tensor.nbytes)
        if len(shards) > 1:
            _write_json(folder / INDEX_FILE, index_of(shards))
        _write_json(folder / "config.json", _with_dtype(base_config, target_dtype))
        _copy_companions(base, folder)
        _make_default(_trained_template(identity), base, folder)
        (folder / "README.md").write_text(model_card(identity, identity.run if run is None else run), encoding="utf-8")
        certify_export(folder)
    return Exported(checkpoint, str(target_dtype).removeprefix("torch."), nbytes, len(shards))


def export_adapter(checkpoint: str | Path, base: str | Path, output: str | Path) -> Exported:
    """Write the low-rank adapters of a run as a folder that ``peft`` loads on top of the Hugging Face folder ``base``.

    Raises:
        UserError: as :func:`export_checkpoint`, or the checkpoint has no adapters.
    """
    base, output = model_folder(base), Path(output)
    refuse_existing(output)
    checkpoint = find_checkpoint(Path(checkpoint))
    identity = read_metadata(checkpoint)
    fields = _common_fields(identity, checkpoint, read_json(base / "config.json"), base)
    low_rank = adapters_of(
        TorchDistReader(checkpoint / WEIGHTS), identity, family_of(identity.hf_config), fields, checkpoint
    )
    if low_rank is None:
        raise UserError(
            f"checkpoint {checkpoint} has no adapters: every weight was trained; export it with export.lora=merged"
        )
    tensors = low_rank.peft_tensors()
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    with atomic_folder(output, nbytes) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        _write_json(folder / "adapter_config.json", low_rank.peft_config(str(base)))
        (folder / "README.md").write_text(model_card(identity, identity.run), encoding="utf-8")
        certify_export(folder)
    return Exported(checkpoint, "float32", nbytes, 1)


def check_tensors(reader: TorchDistReader, family: Family, fields: dict[str, Any], checkpoint: Path) -> None:
    """Check keys and shapes of a checkpoint's model tensors; optimizer and other state are ignored.

    Raises:
        UserError: a tensor is missing, has the wrong shape, or is not part of the architecture.
    """
    expected = set()
    for parameter in family.parameters(fields):
        key = MODEL_PREFIX + parameter.key
        expected.add(key)
        if key not in reader.tensors:
            raise UserError(f"checkpoint {checkpoint} lacks {key}, which a {family.architecture} has")
        stored = tuple(reader.tensors[key].size)
        shape = stacked_shape(parameter, fields)
        padded = parameter.sources[0].dims.startswith("vocab") and stored[0] >= shape[0] and stored[1:] == shape[1:]
        if stored != shape and not padded:
            raise UserError(
                f"checkpoint {checkpoint}: {key} has shape {list(stored)}, the model's config.json says {list(shape)}"
            )
    extra = sorted(key for key in reader.tensors if key.startswith(MODEL_PREFIX) and key not in expected)
    if extra:
        raise UserError(
            f"checkpoint {checkpoint} has {extra[0]}, which is not part of a {family.architecture} "
            "with this config.json"
        )


def _common_fields(identity: CheckpointMetadata, checkpoint: Path, base_config: dict, base: Path) -> dict[str, Any]:
    ours = {"architecture": identity.family, **model_fields(identity.hf_config)}
    theirs = {"architecture": family_of(base_config).architecture, **model_fields(base_config)}
    for name in sorted((ours.keys() | theirs.keys()) - FREE_FIELDS):
        if ours.get(name) != theirs.get(name):
            raise UserError(
                f"checkpoint {checkpoint} is not of the model in {base}: {name} is {ours.get(name)!r} "
                f"and {theirs.get(name)!r}"
            )
    return ours


def planned_tensors(
    family: Family, fields: dict[str, Any], dtype: torch.dtype, others: Mapping[str, torch.dtype] = NO_OTHERS
) -> list[PlannedTensor]:
    """The Hugging Face tensors of a model with these fields, in the order of :func:`exported_tensors`.

    Args:
        dtype: precision of the tensors.
        others: by key, the precision of parameters where it is not ``dtype``.
    """
    return [
        PlannedTensor(source.at(index), source_shape(source, fields), others.get(parameter.key, dtype))
        for parameter, index in in_model_order(family, fields)
        for source in parameter.sources
    ]


def exported_tensors(
    reader: TorchDistReader,
    family: Family,
    fields: dict[str, Any],
    dtype: torch.dtype,
    others: Mapping[str, torch.dtype] = NO_OTHERS,
) -> Iterator[list[memoryview | ByteRange]]:
    """The bytes of each tensor of :func:`planned_tensors`, in its precision.

    They are byte ranges of the checkpoint's files, or in memory until the next tensor is requested.

    Raises:
        UserError: a value does not fit into the precision.
    """
    whole, part = ReusableBuffer(), ReusableBuffer()
    for parameter, index in in_model_order(family, fields):
        key = MODEL_PREFIX + parameter.key
        shapes = [source_shape(source, fields) for source in parameter.sources]
        stored_dtype = reader.tensors[key].properties.dtype
        ranges = None
        target_dtype = others.get(parameter.key, dtype)
        if parameter.groups is None and stored_dtype == target_dtype:
            first_rows = itertools.accumulate((shape[0] for shape in shapes), initial=0)
            ranges = [
                reader.rows_in_files(key, index, row, shape) for row, shape in zip(first_rows, shapes, strict=False)
            ]
        if ranges and None not in ranges:
            yield from ranges
            continue
        merged = whole.tensor(parameter_shape(parameter, fields), stored_dtype)
        reader.read_into(key, merged, index)
        for source, shape, views in zip(
            parameter.sources, shapes, source_views(parameter, merged, fields), strict=True
        ):
            tensor = part.tensor(shape, target_dtype)
            for view, block in zip(views, tensor.split(block_rows(source, fields)), strict=True):
                copy_within_range(block.view(view.shape), view, source.at(index))
            yield [as_bytes(tensor)]


def _with_dtype(config: dict, dtype: torch.dtype) -> dict:
    # transformers 4.56 renamed torch_dtype to dtype: use the names that the base model uses
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return config | dict.fromkeys(keys, name_of(dtype))


def _copy_companions(base: Path, folder: Path) -> None:
    companions = {path for pattern in COPIED for path in base.glob(pattern)} | set(_own_code(base))
    for path in companions:
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)


def _trained_template(identity: CheckpointMetadata) -> str:
    """Name of the chat template that a run's data was made with, where it is not the default one; otherwise empty."""
    return ((identity.run.get("data") or {}).get("tokenizer") or {}).get("chat_template", "")


def _make_default(template: str, base: Path, folder: Path) -> None:
    """Make one of a tokenizer's chat templates the one that is used if none is named."""
    if template:
        (folder / "chat_template.jinja").write_text(load_tokenizer(base, template).template, encoding="utf-8")


def _own_code(base: Path) -> list[Path]:
    """The Python files of a model whose config files name some by ``auto_map``; they are copied and never executed."""
    configs = [base / name for name in ("config.json", "tokenizer_config.json", "processor_config.json")]
    if not any(path.is_file() and read_json(path).get("auto_map") for path in configs):
        return []
    code = sorted(base.glob("*.py"))
    names = ", ".join(path.name for path in code) or "no file, as none is there"
    logger.info("auto_map in %s names Python code: copied %s", base, names)
    return code


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
