"""Llama 2, 3, 3.1, 3.2, and the many models that share its architecture."""

from typing import Any

from treg_megatron.models.families.decoder import LLAMA_LAYER
from treg_megatron.models.families.family import Family
from treg_megatron.models.families.fields import decoder_fields, refuse_options, rope_fields, rope_settings


def _fields(hf_config: dict) -> dict[str, Any]:
    refuse_options(hf_config, "attention_bias", "mlp_bias")
    fields = decoder_fields(hf_config) | rope_fields(hf_config, known=("default", "llama3"))
    rope = rope_settings(hf_config)
    if rope["rope_type"] == "default":
        return fields
    return fields | {
        "scale_factor": rope["factor"],
        "low_freq_factor": rope["low_freq_factor"],
        "high_freq_factor": rope["high_freq_factor"],
        "old_context_len": rope["original_max_position_embeddings"],
    }


LLAMA = Family(
    architecture="LlamaForCausalLM",
    layer=LLAMA_LAYER,
    fields=_fields,
    nemo_config=lambda c: "LlamaConfig" if rope_settings(c)["rope_type"] == "default" else "Llama31Config",
    ignored_suffixes=(".rotary_emb.inv_freq",),
)
