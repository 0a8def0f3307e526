"""One declarative parameter map per architecture: which Hugging Face tensors make up each Megatron parameter.

A map is a table of :class:`Parameter` rows. Everything else follows from it and from ``config.json``: the keys and
shapes of a Megatron checkpoint, the parameter names of a model, the expected tensors of the Hugging Face folder, and
the inverse conversion. A new architecture is one file here, imported below; docs/CONVERSION.md shows a complete one.
"""

from typing import Any

from treg_megatron.errors import UserError

# each module registers its architecture; messages list them in this order
# isort: off
from treg_megatron.models.families import llama, mistral, qwen2, qwen3, gemma2, mixtral, qwen3_moe, phi3, gemma3  # noqa: F401

# isort: on
from treg_megatron.models.families.decoder import EMBEDDING, OUTPUT_LAYER
from treg_megatron.models.families.family import FAMILIES, Family, in_model_order, register, stacked_indices
from treg_megatron.models.families.fields import DEFAULTS, shown
from treg_megatron.models.families.parameters import (
    HFTensor,
    Interleaving,
    Parameter,
    block_rows,
    checkpoint_key,
    interleaving,
    name_at,
    parameter_shape,
    source_shape,
    source_views,
    stacked_shape,
    stacking,
)

__all__ = [
    "EMBEDDING",
    "FAMILIES",
    "FREE_FIELDS",
    "OUTPUT_LAYER",
    "Family",
    "HFTensor",
    "Interleaving",
    "Parameter",
    "block_rows",
    "checkpoint_key",
    "family_of",
    "in_model_order",
    "interleaving",
    "model_fields",
    "name_at",
    "parameter_shape",
    "stacked_indices",
    "register",
    "source_shape",
    "source_views",
    "stacked_shape",
    "stacking",
]

#: fields that may differ between config.json files of one model: they affect neither shapes nor the forward pass
FREE_FIELDS = {"seq_length", "init_method_std", "attention_dropout"}


#: architectures that are asked for and cannot be trained here, with what is missing
REFUSED = {
    "DeepseekV2ForCausalLM": "its multi-head latent attention and shared experts have no parameter map",
    "DeepseekV3ForCausalLM": "its multi-head latent attention and shared experts have no parameter map",
    "Gemma3ForConditionalGeneration": "it sees images: save its language model alone, as a Gemma3ForCausalLM",
    "GptOssForCausalLM": "its attention sinks and biased experts have no parameter map, and its weights are quantized",
    "Llama4ForCausalLM": "its chunked attention and shared experts have no parameter map",
    "Llama4ForConditionalGeneration": "it sees images, and its chunked attention has no parameter map",
    "Mistral3ForConditionalGeneration": "it sees images: save its language model alone, as a MistralForCausalLM",
}


def family_of(hf_config: dict) -> Family:
    """The family of a config.json.

    Raises:
        UserError: the architecture is not supported.
    """
    names = hf_config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f'architectures in config.json is {shown(names)}; it must be a list, such as ["LlamaForCausalLM"]'
        )
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
        if name in REFUSED:
            raise UserError(f"architecture {name} is not supported: {REFUSED[name]}")
    raise UserError(
        f"architecture {', '.join(names) or '(none in config.json)'} is not supported; known: {', '.join(FAMILIES)}"
    )


def model_fields(hf_config: dict) -> dict[str, Any]:
    """Keyword arguments for the model's NeMo config dataclass (a Megatron-core ``TransformerConfig``), as JSON types.

    ``vocab_size`` is the unpadded vocabulary and ``seq_length`` the maximum sequence length. ``activation``, the name
    of the activation function, is the only key that is not a field of the dataclass.

    Raises:
        UserError: an unsupported architecture or option, or a value of the wrong type or out of range.
    """
    family = family_of(hf_config)
    if hf_config.get("quantization_config"):
        raise UserError(
            "the model is quantized (quantization_config in config.json); start from its full-precision weights"
        )
    try:
        return family.fields({**DEFAULTS, **family.defaults, **hf_config, "architectures": [family.architecture]})
    except KeyError as error:
        raise UserError(f"config.json of a {family.architecture} lacks {error}") from None
