"""A mixture of experts in place of the MLP."""

from typing import Any

from treg_megatron.models.families.fields import refuse, size
from treg_megatron.models.families.parameters import HFTensor, Parameter


def mixture(block: str, gate: str, up: str, down: str) -> tuple[Parameter, ...]:
    """The norm before the experts, their router, and their gated MLPs.

    Args:
        block: Hugging Face's name of the layer's mixture.
        gate, up, down: Hugging Face's names of an expert's projections.
    """
    expert = f"{block}.experts.{{expert}}"
    return (
        # Megatron never fuses the norm before experts: module and checkpoint key have this name under every layer spec
        Parameter(
            "decoder.layers.{layer}.pre_mlp_layernorm.weight",
            (HFTensor("model.layers.{layer}.post_attention_layernorm.weight", "hidden"),),
        ),
        Parameter("decoder.layers.{layer}.mlp.router.weight", (HFTensor(f"{block}.gate.weight", "experts hidden"),)),
        Parameter(
            "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight",
            (HFTensor(f"{expert}.{gate}.weight", "ffn hidden"), HFTensor(f"{expert}.{up}.weight", "ffn hidden")),
        ),
        Parameter(
            "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc2.weight",
            (HFTensor(f"{expert}.{down}.weight", "hidden ffn"),),
        ),
    )


def router_fields(hf_config: dict, experts: str, normalised: bool = True) -> dict[str, Any]:
    """Fields of a softmax router.

    Args:
        experts: the key of config.json that counts the experts.
        normalised: whether the probabilities of a token's experts sum to one. Softmax over the chosen experts' logits
            is the same as softmax over all and division by the chosen ones' sum.

    Raises:
        UserError: no such router.
        KeyError: config.json lacks a size.
    """
    number, chosen = size(hf_config, experts), size(hf_config, "num_experts_per_tok")
    if chosen > number:
        refuse(hf_config, "num_experts_per_tok", f"at most {experts}, {number}")
    if normalised and chosen == 1:
        refuse(hf_config, "num_experts_per_tok", "at least 2: a single expert has probability 1, and no gradient")
    return {
        "num_moe_experts": number,
        "moe_router_topk": chosen,
        "moe_router_pre_softmax": not normalised,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.0,  # the recipe's, in training: build.policy_config
    }
