"""Megatron-core transformer layers in plain PyTorch, for use without Transformer Engine.

Megatron's own "local" layers support neither sequence parallelism (the norm) nor packed sequences (the attention), and
they materialise the full score matrix. This spec replaces only the modules that
:class:`~treg_megatron.kernels.kernels.Kernels` names. Parameter names are those of the local spec, checkpoint keys
those of Transformer Engine.
"""

from collections.abc import Callable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from treg_megatron.distributed.context_parallel import ContextPart
from treg_megatron.kernels.core_attention import PackedRow, SdpaAttention
from treg_megatron.kernels.kernels import Kernels
from treg_megatron.kernels.linear import ColumnParallelLinearIn, RowParallelLinearIn
from treg_megatron.models.rotary import halves


def torch_block_spec(config: TransformerConfig, kernels: Kernels, vp_stage: int | None = None) -> ModuleSpec:
    """Spec of this pipeline stage's decoder block, with every layer and the final norm built from ``kernels``.

    If the config has ``post_layer_norms`` set, attention and MLP are followed by a norm, as in Gemma 2 and 3.
    """
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = kernels.norm
    if layer.submodules.pre_mlp_layernorm is not IdentityOp:
        layer.submodules.pre_mlp_layernorm = kernels.norm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = kernels.core_attention
    if config.context_parallel_size > 1:
        attention.core_attention = ContextParallelAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = kernels.norm
    if kernels.rotary is not None and not config.rotary_interleaved:
        layer.submodules.self_attention.module = RotatedSelfAttention
        layer.submodules.self_attention.params["rotary"] = kernels.rotary
    if getattr(config, "local_rotary_base", None) is not None:
        layer.submodules.self_attention.module = _OF_TWO_ROTATIONS[layer.submodules.self_attention.module]
    mlp = layer.submodules.mlp.submodules
    if config.num_moe_experts:
        mlp = mlp.experts.submodules
        # the local spec maps this norm's key to a fused linear_fc1, which experts never have
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    post_norm = kernels.norm if getattr(config, "post_layer_norms", False) else None
    attention.linear_qkv = mlp.linear_fc1 = _column_parallel(kernels)
    attention.linear_proj = mlp.linear_fc2 = _row_parallel(kernels, post_norm)
    if kernels.activation is not None and config.activation_func is torch.nn.functional.silu:
        if not config.num_moe_experts:  # experts scale the activation's output by the router's probabilities
            layer.submodules.mlp = _gated_mlp(mlp, kernels.activation)
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return ModuleSpec(
        module=TransformerBlock,
        submodules=TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=kernels.norm),
    )


def _column_parallel(kernels: Kernels) -> ModuleSpec | type:
    if kernels.linear is None:
        return ColumnParallelLinear
    return ModuleSpec(ColumnParallelLinearIn, params={"products": kernels.linear})


def _row_parallel(kernels: Kernels, norm: type[torch.nn.Module] | None) -> ModuleSpec | type:
    module, params = RowParallelLinear, {}
    if kernels.linear is not None:
        module, params = RowParallelLinearIn, {"products": kernels.linear}
    if norm is None:
        return ModuleSpec(module, params=params)
    return ModuleSpec(_WITH_NORM[module], params=params | {"norm": norm})


class _WithNorm:
    """Mix-in for row-parallel linear layers that adds a norm on the output; parameter names are those of NeMo's
    ``TERowParallelLinearLayerNorm``."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, norm: type[torch.nn.Module], **kwargs
    ):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = norm(config, output_size, config.layernorm_epsilon)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(hidden)
        return self.post_layernorm(output), bias


class RowParallelLinearWithNorm(_WithNorm, RowParallelLinear):
    """Megatron's layer with a norm on its output."""


class RowParallelLinearInWithNorm(_WithNorm, RowParallelLinearIn):
    """The layer that computes its matrix products in a given context, with a norm on its output."""


_WITH_NORM = {RowParallelLinear: RowParallelLinearWithNorm, RowParallelLinearIn: RowParallelLinearInWithNorm}


def _gated_mlp(submodules: MLPSubmodules, activation: Callable[[Tensor], Tensor]) -> type[MLP]:
    """Megatron's dense MLP with the given gated activation: [..., 2 * width] -> [..., width].

    Returns a class rather than a spec, because Megatron's layer warns about a spec whose module is not its own MLP.
    """

    class GatedMLP(MLP):
        def __init__(self, config: TransformerConfig):
            super().__init__(config, submodules, ffn_hidden_size=config.ffn_hidden_size)

        # megatron-core 0.16 also passes padding_mask, which concerns routers alone
        def forward(self, hidden: Tensor, per_token_scale: Tensor | None = None, **_) -> tuple[Tensor, Tensor | None]:
            gate_and_up, bias = self.linear_fc1(hidden)
            if bias is not None:
                gate_and_up = gate_and_up + bias
            return self.linear_fc2(activation(gate_and_up))

    return GatedMLP


class RotatedSelfAttention(SelfAttention):
    """Megatron's self-attention with a given rotary position embedding.

    Megatron calls a module-level function for the rotation, which could only be replaced by a process-wide patch.
    Instead, the one path through its ``forward`` that training takes is repeated here.

    Args:
        rotary: function of x [..., d] and angles that returns the rotated x.
    """

    def __init__(self, *args, rotary: Callable[[Tensor, Tensor], Tensor], **kwargs):
        super().__init__(*args, **kwargs)
        self.rotary = rotary

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *args,
        rotary_pos_emb: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
        inference_context=None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, hidden] -> [s, b, hidden]; angles are [s, 1, 1, d], or [t, 1, d] per token of a packed batch."""
        if inference_context is not None or rotary_pos_emb is None:
            return super().forward(
                hidden_states,
                attention_mask,
                *args,
                rotary_pos_emb=rotary_pos_emb,
                attention_bias=attention_bias,
                packed_seq_params=packed_seq_params,
                inference_context=inference_context,
                **kwargs,
            )
        query, key, value = self.get_query_key_value_tensors(hidden_states, None)
        if packed_seq_params is not None:
            query, key, value = (x.squeeze(1) for x in (query, key, value))
        query, key = self.rotary(query, rotary_pos_emb), self.rotary(key, rotary_pos_emb)
        attend = (
            self._checkpointed_attention_forward
            if self.checkpoint_core_attention and self.training
            else self.core_attention
        )
        out = attend(
            query,
            key,
            value,
            attention_mask,
            attn_mask_type=self.attn_mask_type,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
        )
        return self.linear_proj(out if packed_seq_params is None else out.reshape(len(out), 1, -1))


class _OfTwoRotations:
    """Mix-in for self-attention in a model with two rotary embeddings: local angles where the layer's window slides."""

    def forward(self, *args, rotary_pos_emb: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        local, everywhere = halves(rotary_pos_emb)
        config = self.config
        slides = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number)
        return super().forward(*args, rotary_pos_emb=local if slides else everywhere, **kwargs)


class SelfAttentionOfTwoRotations(_OfTwoRotations, SelfAttention):
    """Megatron's self-attention with the layer's own of two rotary embeddings."""


class RotatedSelfAttentionOfTwoRotations(_OfTwoRotations, RotatedSelfAttention):
    """Self-attention with a given rotation by the layer's own of two rotary embeddings."""


_OF_TWO_ROTATIONS = {
    SelfAttention: SelfAttentionOfTwoRotations,
    RotatedSelfAttention: RotatedSelfAttentionOfTwoRotations,
}


def _context_part() -> ContextPart:
    return ContextPart(parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size())


class ContextParallelAttention(SdpaAttention):
    """Attention over packed sequences with context parallelism: keys and values are gathered from all ranks, and each
    of this rank's two chunks of a sequence attends to everything up to its own end."""

    def attend_packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedRow) -> Tensor:
        """[t / ranks, heads, d], keys and values [t / ranks, groups, d] -> [t / ranks, heads * d]."""
        return self.attend_each(_chunks(query, key, value, [span.tokens for span in packed.spans], _context_part()))


def _chunks(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], context: ContextPart
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's two query chunks of each sequence, each with all keys and values up to the chunk's end."""
    lengths = [length // context.ranks for length in lengths]
    group = parallel_state.get_context_parallel_group()
    key, value = (
        gather_from_sequence_parallel_region(x, group=group).unflatten(0, (context.ranks, -1)) for x in (key, value)
    )
    for q, k, v in zip(query.split(lengths), key.split(lengths, 1), value.split(lengths, 1), strict=True):
        k, v = context.joined(k), context.joined(v)
        for chunk, number in zip(q.chunk(2), context.chunks, strict=True):
            end = (number + 1) * len(chunk)
            yield chunk, k[:end], v[:end]
