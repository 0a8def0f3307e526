"""Megatron-core transformer layers on plain PyTorch kernels, where Transformer Engine is not installed.

Megatron's own "local" layers refuse sequence parallelism (their norm), packed sequences (their attention) and hold the
whole score matrix. This spec keeps all of Megatron's modules except those two: an RMSNorm that says its gradient is
partial under sequence parallelism, and attention on ``scaled_dot_product_attention``. Parameter names and checkpoint
keys are the local spec's.
"""

import math

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def torch_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> ModuleSpec:
    """The decoder block of this pipeline stage, every layer and the final norm on PyTorch kernels."""
    layer = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm,
                                     normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    if layer.submodules.pre_mlp_layernorm is not IdentityOp:
        layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SdpaAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return ModuleSpec(module=TransformerBlock,
                      submodules=TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm))


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467); weight is 1 + gamma where the config says so.

    Under sequence parallelism each rank sees part of the sequence, so the weight's gradient is partial: the mark
    ``sequence_parallel`` makes Megatron sum it over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        weight = 1 + self.weight if self.zero_centered else self.weight
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self.eps)


class SdpaAttention(MegatronModule):
    """Causal grouped-query attention on ``scaled_dot_product_attention``.

    Packed sequences (THD) are attended one by one: block-diagonal without a mask, and no work between sequences.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType,
                 attention_type: str, attention_dropout: float | None = None, softmax_scale: float | None = None,
                 cp_comm_type: str | None = None, pg_collection=None):
        super().__init__(config=config)
        if config.context_parallel_size > 1:
            raise ValueError("context parallelism needs Transformer Engine's attention, which is not installed")
        self.softmax_scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
                attn_mask_type: AttnMaskType | None = None, attention_bias: Tensor | None = None,
                packed_seq_params: PackedSeqParams | None = None) -> Tensor:
        """[s, b, heads, d] or packed [t, heads, d] -> [s, b, heads * d] or [t, heads * d]."""
        if packed_seq_params is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out.permute(2, 0, 1, 3).flatten(2)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        parts = zip(query.split(lengths), key.split(lengths), value.split(lengths))
        out = [self._attend(*(x.transpose(0, 1)[None] for x in part)) for part in parts]
        return torch.cat([x[0].transpose(0, 1) for x in out]).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[b, heads, s, d], [b, groups, s, d] -> [b, heads, s, d]."""
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=query.shape[1] != key.shape[1],
            dropout_p=self.dropout if self.training else 0.0)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Nothing to save: attention has no parameters."""
        return {}
