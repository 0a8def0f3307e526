"""Which Hugging Face tensors make up each Megatron parameter, and how they are laid out in it.

Megatron fuses several Hugging Face tensors into one parameter. They are concatenated along axis 0 (``linear_fc1``:
gate, then up) or interleaved by query group (``linear_qkv``: a group's query heads, its key head, its value head, then
the next group), so that each tensor-parallel rank holds a contiguous slice. :class:`Interleaving` covers both.

A checkpoint stacks a parameter's layers on axis 0 and its experts on axis 1 of one tensor. ``index`` is the index of a
single layer or expert on those axes: ``()``, ``(layer,)`` or ``(layer, expert)``.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch

# Placeholders in a name and the model field that counts each, in the order of the checkpoint's axes.
STACKED = {"layer": "num_layers", "expert": "num_moe_experts"}


def name_at(name: str, index: tuple[int, ...]) -> str:
    """``name`` with ``{layer}`` and ``{expert}`` filled in."""
    return name.format(**dict(zip(STACKED, index, strict=False)))


@dataclass(frozen=True)
class HFTensor:
    """A Hugging Face tensor: its name, with placeholders ``{layer}`` and ``{expert}``, and its dimensions by name.

    The first of them may be a sum, as in ``query+kv+kv hidden``: blocks of rows that Megatron lays out separately.
    """

    name: str
    dims: str

    def at(self, index: tuple[int, ...]) -> str:
        """The tensor's name in one layer, for one expert."""
        return name_at(self.name, index)


@dataclass(frozen=True)
class Parameter:
    """A Megatron parameter and the Hugging Face tensors fused into it.

    Attributes:
        name: parameter name under Transformer Engine's layer spec, with placeholders ``{layer}`` and ``{expert}``.
            The checkpoint key omits both, and is the same for every layer spec.
        sources: the Hugging Face tensors, in the order in which Megatron stores them.
        groups: the model field that gives the number of groups by which the sources are interleaved along axis 0; None
            if they are concatenated.
        local_name: parameter name under a torch-native layer spec, where it differs.
        only_if: the model field without which the model lacks this parameter; None if it always has it.
    """

    name: str
    sources: tuple[HFTensor, ...]
    groups: str | None = None
    local_name: str | None = None
    only_if: str | None = None

    @property
    def stacking(self) -> tuple[str, ...]:
        """The model fields that give the sizes of the checkpoint tensor's leading axes: layers, then experts."""
        return stacking(self.name)

    @property
    def key(self) -> str:
        """Key in a Megatron-core checkpoint."""
        return checkpoint_key(self.name)


def stacking(name: str) -> tuple[str, ...]:
    """The model fields that count a name's placeholders, in the order of the checkpoint's axes."""
    return tuple(field for what, field in STACKED.items() if f"{{{what}}}" in name)


def checkpoint_key(name: str) -> str:
    """The key of the parameter or module ``name`` in a Megatron-core checkpoint."""
    return name.replace(".{layer}", "").replace("local_experts.{expert}", "experts")


class Interleaving:
    """Invertible layout of several tensors in one: split into groups along axis 0 and concatenated group by group.

    ``groups=1`` is plain concatenation.
    """

    def __init__(self, groups: int, rows: list[int]):
        """``rows``: number of rows (axis 0) of each tensor, each a multiple of ``groups``."""
        self.groups = groups
        self.rows_per_group = [r // groups for r in rows]

    def part(self, merged: torch.Tensor, index: int) -> torch.Tensor:
        """The view [groups, rows / groups, ...] of ``merged`` ([sum of rows, ...]) that holds tensor ``index``.

        Copy into the view to merge, read from it to split.
        """
        grouped = merged.view(self.groups, sum(self.rows_per_group), *merged.shape[1:])
        return grouped.narrow(1, sum(self.rows_per_group[:index]), self.rows_per_group[index])


def interleaving(parameter: Parameter, fields: dict[str, Any]) -> Interleaving:
    """The layout of the blocks of rows of all sources of ``parameter`` in a model with these fields."""
    groups = fields[parameter.groups] if parameter.groups else 1
    return Interleaving(groups, [rows for source in parameter.sources for rows in block_rows(source, fields)])


def source_views(parameter: Parameter, merged: torch.Tensor, fields: dict[str, Any]) -> list[list[torch.Tensor]]:
    """For each source, the views of ``merged`` that hold its blocks of rows, each [groups, rows / groups, ...]."""
    layout, parts = interleaving(parameter, fields), itertools.count()
    return [[layout.part(merged, next(parts)) for _ in block_rows(source, fields)] for source in parameter.sources]


def source_shape(tensor: HFTensor, fields: dict[str, Any]) -> tuple[int, ...]:
    """Shape of one Hugging Face tensor of a model with these fields."""
    return tuple(sum(_sizes(dim, fields)) for dim in tensor.dims.split())


def block_rows(tensor: HFTensor, fields: dict[str, Any]) -> list[int]:
    """Rows of each block of a Hugging Face tensor, see :class:`HFTensor`."""
    return _sizes(tensor.dims.split()[0], fields)


def _sizes(dim: str, fields: dict[str, Any]) -> list[int]:
    sizes = {
        "vocab": fields["vocab_size"],
        "hidden": fields["hidden_size"],
        "ffn": fields["ffn_hidden_size"],
        "head": fields["kv_channels"],
        "query": fields["num_attention_heads"] * fields["kv_channels"],
        "kv": fields["num_query_groups"] * fields["kv_channels"],
        "experts": fields.get("num_moe_experts"),
    }
    return [sizes[name] for name in dim.split("+")]


def parameter_shape(parameter: Parameter, fields: dict[str, Any]) -> tuple[int, ...]:
    """Shape of the Megatron parameter (unpadded vocabulary) of one layer and expert in a model with these fields."""
    shapes = [source_shape(s, fields) for s in parameter.sources]
    return (sum(s[0] for s in shapes), *shapes[0][1:])


def stacked_shape(parameter: Parameter, fields: dict[str, Any]) -> tuple[int, ...]:
    """Shape of the checkpoint tensor that holds a parameter of every layer and expert."""
    return (*(fields[f] for f in parameter.stacking), *parameter_shape(parameter, fields))
