"""The interface of an architecture, and the registry of supported ones."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, ClassVar

from treg_megatron.config.schema import ParallelSection
from treg_megatron.errors import UserError
from treg_megatron.models.families.decoder import EMBEDDING, FINAL_NORM, OUTPUT_LAYER
from treg_megatron.models.families.parameters import Parameter, stacking

# Modules that are Megatron-core's own under every layer spec, and so have no FP8 state.
WITHOUT_EXTRA_STATE = ("embedding.word_embeddings", "output_layer", "decoder.layers.{layer}.mlp.router")


class Family(ABC):
    """An architecture that can be converted and trained; each is a subclass in its own file, with :func:`register`.

    Attributes:
        architecture: the name in ``architectures`` of config.json.
        layer: the parameters that a layer may have, in the order of the Hugging Face folder.
        defaults: what transformers takes for keys that config.json lacks, where it is not ``fields.DEFAULTS``.
        post_layer_norms: whether the outputs of attention and MLP are normalised, as Gemma 2's are.
    """

    architecture: str
    layer: tuple[Parameter, ...]
    defaults: ClassVar[Mapping[str, Any]] = {}
    post_layer_norms: bool = False

    @abstractmethod
    def fields(self, hf_config: dict[str, Any]) -> dict[str, Any]:
        """Turn config.json into Megatron's fields, see :func:`treg_megatron.models.families.model_fields`.

        Raises:
            UserError: an option that is not supported.
            KeyError: config.json lacks a field.
        """

    @abstractmethod
    def nemo_classes(self, hf_config: dict[str, Any]) -> tuple[type, type]:
        """NeMo's config dataclass, which takes the fields, and its Lightning module. Import NeMo inside the method."""

    def require_schedule(self, parallel: ParallelSection) -> None:
        """Require a pipeline schedule for which NeMo's module of the architecture can be built.

        Raises:
            UserError: it is interleaved, and the module builds one chunk of a stage only.
        """
        if self.post_layer_norms and parallel.virtual_pipeline:
            raise UserError(
                f"parallel.virtual_pipeline={parallel.virtual_pipeline}: NeMo's module of this model builds one chunk "
                "of a stage only; set it to null"
            )

    def parameters(self, fields: dict[str, Any]) -> list[Parameter]:
        """All parameters of a model with these fields, in the order of its Hugging Face tensors."""
        tied = fields["share_embeddings_and_output_weights"]
        return [EMBEDDING, *self.layer_parameters(fields), FINAL_NORM] + ([] if tied else [OUTPUT_LAYER])

    def layer_parameters(self, fields: dict[str, Any]) -> list[Parameter]:
        """The parameters of one layer of a model with these fields."""
        return [p for p in self.layer if p.only_if is None or fields[p.only_if]]

    def extra_state_modules(self) -> list[str]:
        """Modules that load ``_extra_state`` from a checkpoint: FP8 scales in Transformer Engine, empty elsewhere."""
        owners = dict.fromkeys(p.name.rpartition(".")[0] for p in (*self.layer, FINAL_NORM))
        return [
            "decoder.layers.{layer}.self_attention.core_attention",
            *(module for module in owners if module not in WITHOUT_EXTRA_STATE),
        ]


#: supported architectures by their name in config.json
FAMILIES: dict[str, Family] = {}


def register(family: type[Family]) -> type[Family]:
    """Class decorator that adds an architecture to :data:`FAMILIES`.

    Raises:
        ValueError: the architecture is registered already.
    """
    if family.architecture in FAMILIES:
        raise ValueError(f"{family.architecture} is registered by {type(FAMILIES[family.architecture]).__name__}")
    FAMILIES[family.architecture] = family()
    return family


def stacked_indices(name: str, fields: dict[str, Any]) -> list[tuple[int, ...]]:
    """Every index (see :mod:`.parameters`) that the placeholders of a name can take."""
    return list(product(*(range(fields[f]) for f in stacking(name))))


def in_model_order(family: Family, fields: dict[str, Any]) -> Iterator[tuple[Parameter, tuple[int, ...]]]:
    """Every parameter with its index, in the order of a transformers model: embedding, layers, the rest."""
    parameters, of_layer = family.parameters(fields), family.layer_parameters(fields)
    first, last = parameters.index(of_layer[0]), parameters.index(of_layer[-1])
    yield from ((p, ()) for p in parameters[:first])
    for layer in range(fields["num_layers"]):
        yield from ((p, index) for p in of_layer for index in stacked_indices(p.name, fields) if index[0] == layer)
    yield from ((p, ()) for p in parameters[last + 1 :])
