"""What an architecture is made of."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from treg_megatron.models.families.decoder import EMBEDDING, FINAL_NORM, OUTPUT_LAYER
from treg_megatron.models.families.parameters import Parameter, stacking

# Modules of Megatron-core's own, which have no FP8 state to save.
WITHOUT_EXTRA_STATE = ("embedding.word_embeddings", "output_layer", "decoder.layers.{layer}.mlp.router")


@dataclass(frozen=True)
class Family:
    """An architecture that can be converted and trained.

    Attributes:
        architecture: the name in ``architectures`` of config.json.
        layer: its parameters in every layer.
        fields: turns config.json into Megatron's fields, or refuses it.
        nemo_config: name of NeMo's config dataclass for a config.json.
        ignored_suffixes: tensors that old folders hold and that are no weights.
    """

    architecture: str
    layer: tuple[Parameter, ...]
    fields: Callable[[dict], dict[str, Any]]
    nemo_config: Callable[[dict], str]
    ignored_suffixes: tuple[str, ...] = ()

    def parameters(self, fields: dict[str, Any]) -> list[Parameter]:
        """All parameters of a model with these fields, in the order of its Hugging Face tensors."""
        tied = fields["share_embeddings_and_output_weights"]
        return [EMBEDDING, *self.layer, FINAL_NORM] + ([] if tied else [OUTPUT_LAYER])

    def extra_state_modules(self) -> list[str]:
        """Modules that ask a checkpoint for ``_extra_state``: FP8 scales in Transformer Engine, nothing in the
        torch-native specs."""
        owners = dict.fromkeys(p.name.rpartition(".")[0] for p in (*self.layer, FINAL_NORM))
        return [
            "decoder.layers.{layer}.self_attention.core_attention",
            *(module for module in owners if module not in WITHOUT_EXTRA_STATE),
        ]


def places(name: str, fields: dict[str, Any]) -> list[tuple[int, ...]]:
    """Every place (see :mod:`.parameters`) that a name with ``{layer}`` and ``{expert}`` stands for."""
    return list(product(*(range(fields[f]) for f in stacking(name))))


def in_model_order(family: Family, fields: dict[str, Any]) -> Iterator[tuple[Parameter, tuple[int, ...]]]:
    """Every parameter with its place, in the order of a transformers model: embedding, layers, the rest."""
    parameters = family.parameters(fields)
    first, last = parameters.index(family.layer[0]), parameters.index(family.layer[-1])
    yield from ((p, ()) for p in parameters[:first])
    for layer in range(fields["num_layers"]):
        yield from ((p, place) for p in family.layer for place in places(p.name, fields) if place[0] == layer)
    yield from ((p, ()) for p in parameters[last + 1 :])
