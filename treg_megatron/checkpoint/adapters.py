"""LoRA adapters of a training checkpoint: merged into the base model's weights, or exported in ``peft``'s format.

The adapter of a Megatron parameter W [out, in] is two matrices, A [rank, in] and B [out, rank], and adds
alpha / rank * B A to W (LoRA, arXiv 2106.09685, section 4.1). The Hugging Face tensors held by the parameter share A;
each has its own rows of B.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from treg_megatron.checkpoint.buffers import ReusableBuffer, as_bytes, copy_within_range
from treg_megatron.checkpoint.layout import MODEL_PREFIX, CheckpointMetadata
from treg_megatron.checkpoint.safetensors_stream import DTYPES, StoredTensor
from treg_megatron.checkpoint.torch_dist import TorchDistReader
from treg_megatron.errors import UserError
from treg_megatron.models.families import (
    Family,
    Parameter,
    checkpoint_key,
    in_model_order,
    parameter_shape,
    source_shape,
    source_views,
)

ADAPTER = ".adapter."


class Adapters:
    """The adapters of one checkpoint, read into memory one parameter at a time.

    Args:
        reader: the checkpoint that holds the adapters.
        lora: section ``lora`` of the recipe that the run was trained with.
    """

    def __init__(self, reader: TorchDistReader, family: Family, fields: dict[str, Any], lora: dict[str, Any]):
        self._reader, self._family, self._fields, self._lora = reader, family, fields, lora

    def of(self, parameter: Parameter, index: tuple[int, ...]) -> tuple[torch.Tensor, list[torch.Tensor]] | None:
        """Adapter of a parameter in one layer, for one expert; None if it has none.

        Returns:
            A [rank, in], and for each of the parameter's Hugging Face tensors its B [rows, rank], all fp32.
        """
        module = parameter.name.removesuffix(".weight")
        inward, outward = (
            f"{MODEL_PREFIX}{checkpoint_key(module)}{ADAPTER}{name}.weight" for name in ("linear_in", "linear_out")
        )
        if inward not in self._reader.tensors:
            return None
        rank = self._lora["rank"]
        rows, width = parameter_shape(parameter, self._fields)
        a, b = torch.empty(rank, width), torch.empty(rows, rank)
        for key, whole in ((inward, a), (outward, b)):
            stored = torch.empty(whole.shape, dtype=self._reader.tensors[key].properties.dtype)
            self._reader.read_into(key, stored, index)
            whole.copy_(stored)
        blocks = source_views(parameter, b, self._fields)
        return a, [torch.cat([block.reshape(-1, rank) for block in of_source]) for of_source in blocks]

    def merged_tensors(
        self, base: dict[str, StoredTensor], dtype: torch.dtype, others: Mapping[str, torch.dtype]
    ) -> Iterator[list[memoryview]]:
        """Bytes of each Hugging Face tensor with its adapter added, in the order of a transformers model.

        The sum is computed in fp32 and rounded. The bytes are valid until the next tensor is requested.

        Args:
            base: tensors of the base model's folder, by name.
            dtype: precision of the tensors.
            others: by key, the precision of parameters where it is not ``dtype``.

        Raises:
            UserError: a value does not fit into the precision.
        """
        read, written = ReusableBuffer(), ReusableBuffer()
        scale = self._lora["alpha"] / self._lora["rank"]
        for parameter, index in in_model_order(self._family, self._fields):
            adapter = self.of(parameter, index)
            for i, source in enumerate(parameter.sources):
                stored = base[source.at(index)]
                shape = source_shape(source, self._fields)
                weight = read.tensor(shape, DTYPES[stored.dtype])
                stored.read_into(weight)
                if adapter is not None:
                    weight = weight.float().addmm_(adapter[1][i], adapter[0], alpha=scale)
                tensor = written.tensor(shape, others.get(parameter.key, dtype))
                copy_within_range(tensor, weight, source.at(index))
                yield [as_bytes(tensor)]

    def peft_tensors(self) -> dict[str, torch.Tensor]:
        """lora_A [rank, in] and lora_B [rows, rank] of every adapted Hugging Face tensor, fp32, under peft's names."""
        tensors = {}
        for parameter, index in in_model_order(self._family, self._fields):
            adapter = self.of(parameter, index)
            for i, source in enumerate(parameter.sources if adapter else ()):
                name = "base_model.model." + source.at(index).removesuffix(".weight")
                tensors[f"{name}.lora_A.weight"] = adapter[0].clone()
                tensors[f"{name}.lora_B.weight"] = adapter[1][i].contiguous()
        return tensors

    def peft_config(self, base: str) -> dict[str, Any]:
        """Content of adapter_config.json, with the Hugging Face folder ``base`` as base model."""
        modules = {name.split(".")[-3] for name in self.peft_tensors()}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "inference_mode": True,
            "r": self._lora["rank"],
            "lora_alpha": self._lora["alpha"],
            "lora_dropout": self._lora["dropout"],
            "target_modules": sorted(modules),
            "bias": "none",
            "fan_in_fan_out": False,
        }


def adapters_of(
    reader: TorchDistReader, identity: CheckpointMetadata, family: Family, fields: dict[str, Any], checkpoint: Path
) -> Adapters | None:
    """The adapters of a checkpoint, or None if it has none.

    Raises:
        UserError: it has adapters, but its recorded recipe lacks their rank and scale.
    """
    if not any(ADAPTER in key for key in reader.tensors):
        return None
    lora = identity.run.get("recipe", {}).get("lora", {})
    if not lora.get("rank"):
        raise UserError(
            f"checkpoint {checkpoint} has adapters, but its treg.json does not record lora.rank and lora.alpha"
        )
    return Adapters(reader, family, fields, lora)
