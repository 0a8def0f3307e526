"""Mistral: Llama's parameters, in its first version with a sliding window in every layer."""

from typing import Any

from treg_megatron.models.families.decoder import LLAMA_LAYER
from treg_megatron.models.families.family import Family
from treg_megatron.models.families.fields import decoder_fields, rope_fields, window_fields


def _fields(hf_config: dict) -> dict[str, Any]:
    fields = decoder_fields(hf_config) | rope_fields(hf_config)
    # an absent key means 4096 to transformers, null means none
    return fields | window_fields(hf_config.get("sliding_window", 4096), [True] * fields["num_layers"])


MISTRAL = Family(
    architecture="MistralForCausalLM",
    layer=LLAMA_LAYER,
    fields=_fields,
    nemo_config=lambda c: "MistralConfig7B",
)
