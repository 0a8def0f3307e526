"""One declarative parameter map per architecture: which Hugging Face tensors make up which Megatron parameter.

A map is a table of :class:`Parameter` rows. Everything else is derived from it and from ``config.json``: the keys and
shapes in a Megatron checkpoint, the names inside a model, the shapes that the Hugging Face folder must hold, and the
way back. A new architecture is a file here with a table and a function that turns its ``config.json`` into Megatron's
fields.
"""

from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.models.families.decoder import OUTPUT_LAYER
from treg_megatron.models.families.family import Family, in_model_order, places
from treg_megatron.models.families.gemma2 import GEMMA2
from treg_megatron.models.families.llama import LLAMA
from treg_megatron.models.families.mistral import MISTRAL
from treg_megatron.models.families.mixtral import MIXTRAL
from treg_megatron.models.families.parameters import (
    HFTensor,
    Interleaving,
    Parameter,
    checkpoint_key,
    interleaving,
    name_at,
    parameter_shape,
    source_shape,
    stacked_shape,
    stacking,
)
from treg_megatron.models.families.qwen2 import QWEN2
from treg_megatron.models.families.qwen3 import QWEN3

__all__ = [
    "FAMILIES",
    "FREE_FIELDS",
    "OUTPUT_LAYER",
    "Family",
    "HFTensor",
    "Interleaving",
    "Parameter",
    "checkpoint_key",
    "family_of",
    "in_model_order",
    "interleaving",
    "model_fields",
    "name_at",
    "nemo_config_class",
    "parameter_shape",
    "places",
    "source_shape",
    "stacked_shape",
    "stacking",
]

FAMILIES: dict[str, Family] = {
    family.architecture: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, MIXTRAL)
}

#: fields in which two config.json may differ and be of one model: neither shapes nor what is computed depend on them
FREE_FIELDS = {"seq_length", "init_method_std", "attention_dropout"}


def family_of(hf_config: dict) -> Family:
    """The family of a config.json.

    Raises:
        UserError: an architecture that we do not know.
    """
    names = hf_config.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise UserError(
        f"architecture {', '.join(names) or '(none in config.json)'} is not supported; known: {', '.join(FAMILIES)}"
    )


def model_fields(hf_config: dict) -> dict[str, Any]:
    """Keyword arguments of the model's NeMo config dataclass (a Megatron-core ``TransformerConfig``), JSON-able.

    ``vocab_size`` is the true, unpadded vocabulary, ``seq_length`` the longest position, ``activation`` the name of
    the activation function: the one key that is no field of the dataclass.

    Raises:
        UserError: an unknown architecture, or an option of it that is not supported.
    """
    family = family_of(hf_config)
    if hf_config.get("quantization_config"):
        raise UserError(
            "the model is quantized (quantization_config in config.json); start from its full-precision weights"
        )
    try:
        return family.fields(hf_config)
    except KeyError as error:
        raise UserError(f"config.json of a {family.architecture} lacks {error}") from None


def nemo_config_class(hf_config: dict) -> str:
    """Name of the config dataclass in ``nemo.collections.llm`` that takes :func:`model_fields`."""
    return family_of(hf_config).nemo_config(hf_config)
