"""Which Hugging Face tensors make up which Megatron parameter, and how they lie in it.

Megatron stores the tensors of a parameter in one tensor, one after another along axis 0 (``linear_fc1``: all of gate,
then all of up), or interleaved by query group (``linear_qkv``: the query heads of a group, its key head, its value
head, then the next group), so that a tensor-parallel rank's part is a plain slice. Both are :class:`Interleaving`.

All layers of a parameter share one checkpoint tensor, layers on axis 0, and its experts on axis 1. A *place* is the
position of one parameter on those axes: ``()``, ``(layer,)`` or ``(layer, expert)``.
"""

from dataclasses import dataclass
from typing import Any

import torch

# What a name may leave open, and the model field that counts it, in the order of the checkpoint's axes.
STACKED = {"layer": "num_layers", "expert": "num_moe_experts"}


def name_at(name: str, place: tuple[int, ...]) -> str:
    """``name`` with ``{layer}`` and ``{expert}`` filled in."""
    return name.format(**dict(zip(STACKED, place, strict=False)))


@dataclass(frozen=True)
class HFTensor:
    """A Hugging Face tensor: its name, ``{layer}`` and ``{expert}`` standing for numbers, and the names of its
    dimensions."""

    name: str
    dims: str

    def at(self, place: tuple[int, ...]) -> str:
        """Its name in one layer, of one expert."""
        return name_at(self.name, place)


@dataclass(frozen=True)
class Parameter:
    """A Megatron parameter and the Hugging Face tensors that it holds.

    Attributes:
        name: parameter name under Transformer Engine's layer spec, ``{layer}`` and ``{expert}`` standing for numbers.
            The checkpoint key leaves those numbers out, and is the same whatever the spec.
        sources: the tensors, in the order in which Megatron stores them.
        groups: the model field that counts the groups by which the sources interleave along axis 0; None: no
            interleaving.
        local_name: parameter name under a torch-native layer spec, where it differs.
    """

    name: str
    sources: tuple[HFTensor, ...]
    groups: str | None = None
    local_name: str | None = None

    @property
    def stacking(self) -> tuple[str, ...]:
        """The model fields that count the leading axes of its checkpoint tensor: layers, then experts."""
        return stacking(self.name)

    @property
    def key(self) -> str:
        """Key in a Megatron-core checkpoint."""
        return checkpoint_key(self.name)


def stacking(name: str) -> tuple[str, ...]:
    """The model fields that count what a name leaves open, in the order of the checkpoint's axes."""
    return tuple(field for what, field in STACKED.items() if f"{{{what}}}" in name)


def checkpoint_key(name: str) -> str:
    """Key in a Megatron-core checkpoint of the parameter or module ``name``."""
    return name.replace(".{layer}", "").replace("local_experts.{expert}", "experts")


class Interleaving:
    """The exact, invertible layout of several tensors in one: by group along axis 0, in order within a group.

    ``groups=1`` is plain concatenation.
    """

    def __init__(self, groups: int, rows: list[int]):
        """``rows``: how many rows (axis 0) each tensor has; each is a multiple of ``groups``."""
        self.groups = groups
        self.rows_per_group = [r // groups for r in rows]

    def part(self, merged: torch.Tensor, index: int) -> torch.Tensor:
        """The view [groups, rows / groups, ...] of ``merged`` ([sum of rows, ...]) that holds tensor ``index``.

        Copy into it to merge, read it to split.
        """
        grouped = merged.view(self.groups, sum(self.rows_per_group), *merged.shape[1:])
        return grouped.narrow(1, sum(self.rows_per_group[:index]), self.rows_per_group[index])


def interleaving(parameter: Parameter, fields: dict[str, Any]) -> Interleaving:
    """How the sources of ``parameter`` lie in it, for a model with these fields."""
    groups = fields[parameter.groups] if parameter.groups else 1
    return Interleaving(groups, [source_shape(s, fields)[0] for s in parameter.sources])


def source_shape(tensor: HFTensor, fields: dict[str, Any]) -> tuple[int, ...]:
    """Shape of one Hugging Face tensor of a model with these fields."""
    sizes = {
        "vocab": fields["vocab_size"],
        "hidden": fields["hidden_size"],
        "ffn": fields["ffn_hidden_size"],
        "head": fields["kv_channels"],
        "query": fields["num_attention_heads"] * fields["kv_channels"],
        "kv": fields["num_query_groups"] * fields["kv_channels"],
        "experts": fields.get("num_moe_experts"),
    }
    return tuple(sizes[d] for d in tensor.dims.split())


def parameter_shape(parameter: Parameter, fields: dict[str, Any]) -> tuple[int, ...]:
    """Shape of the Megatron parameter (unpadded vocabulary) at one place in a model with these fields."""
    shapes = [source_shape(s, fields) for s in parameter.sources]
    return (sum(s[0] for s in shapes), *shapes[0][1:])


def stacked_shape(parameter: Parameter, fields: dict[str, Any]) -> tuple[int, ...]:
    """Shape of the checkpoint tensor that holds a parameter of every layer and expert."""
    return (*(fields[f] for f in parameter.stacking), *parameter_shape(parameter, fields))
