"""Megatron-core transformer layers on plain PyTorch kernels, where Transformer Engine is not installed.

Megatron's own "local" layers refuse sequence parallelism (their norm), packed sequences (their attention) and hold the
whole score matrix. This spec keeps all of Megatron's modules except those two: an RMSNorm that says its gradient is
partial under sequence parallelism, and attention on ``scaled_dot_product_attention``. Parameter names are the local
spec's, checkpoint keys are Transformer Engine's.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import RowParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import moe_utils, token_dispatcher
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
from treg_megatron.kernels.attention import causal_attention
from treg_megatron.kernels.packed_attention import Span, packed_attention
from treg_megatron.kernels.rms_norm import RMSNorm
from treg_megatron.kernels.rotary import use_torch_rotation
from treg_megatron.kernels.swiglu import SwiGLU


@dataclass
class SharedPrompts(PackedSeqParams):
    """A packed row of pairs that hold their prompt once (microbatch.shared_row); rotation goes by position ids."""

    pairs: list[tuple[int, int, int]] | None = None  # tokens of prompt, chosen, rejected; what follows is padding


def torch_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> ModuleSpec:
    """The decoder block of this pipeline stage, every layer and the final norm on PyTorch kernels.

    ``config.post_layer_norms``, where a config has it, asks for Gemma 2's norms behind attention and MLP.
    """
    use_torch_rotation()
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = RMSNorm
    if layer.submodules.pre_mlp_layernorm is not IdentityOp:
        layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SdpaAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.use_te_activation_func:  # see build.policy_config
        layer.submodules.mlp.submodules.activation_func = SwiGLU
    if getattr(config, "post_layer_norms", False):
        attention.linear_proj = layer.submodules.mlp.submodules.linear_fc2 = RowParallelLinearWithNorm
    if config.num_moe_experts:
        # the local spec files this norm under a fused linear_fc1, which experts have in no spec
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
        _mend_experts()
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return ModuleSpec(
        module=TransformerBlock, submodules=TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)
    )


def _mend_experts() -> None:
    """Two places where Megatron's experts need Transformer Engine or a GPU without meaning to."""
    # the router asks whether it is None, and it is defined only where Transformer Engine is installed
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    # the all-to-all takes split sizes as an array, which a tensor becomes only on its way from a GPU
    token_dispatcher.maybe_move_tensor_to_cpu = _moved_to_cpu


def _moved_to_cpu(tensor: Tensor | None, as_numpy: bool = False, record_stream: bool = False):
    moved = moe_utils.maybe_move_tensor_to_cpu(tensor, as_numpy, record_stream)
    return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved


class RowParallelLinearWithNorm(RowParallelLinear):
    """A row-parallel linear layer whose output is normalised; its parameters are named as NeMo's
    ``TERowParallelLinearLayerNorm`` names them."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = RMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(hidden)
        return self.post_layernorm(output), bias


class SdpaAttention(MegatronModule):
    """Causal grouped-query attention on ``scaled_dot_product_attention``.

    Packed sequences (THD) are attended one by one: block-diagonal without a mask, and no work between sequences. Of a
    pair that holds its prompt once, the rejected response attends to the prompt and to itself.
    Context-parallel ranks gather the keys and values of all; each of their two pieces of a sequence attends to what
    comes before its end.

    Two options of the config have no fused kernel: a sliding window (``window_size``, in the layers that
    ``window_attn_skip_freq`` names) takes a mask where a sequence is longer than the window, and a soft-cap on the
    scores (``attn_logit_softcapping``) takes the whole score matrix of a sequence in fp32.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
    ):
        super().__init__(config=config)
        head_scale = getattr(config, "query_pre_attn_scalar", config.kv_channels)
        self.softmax_scale = softmax_scale or 1 / math.sqrt(head_scale)
        self.softcap = getattr(config, "attn_logit_softcapping", None)
        slides = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.tokens_before = config.window_size[0] if slides else None
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """[s, b, heads, d] or packed [t, heads, d] -> [s, b, heads * d] or [t, heads * d]."""
        if packed_seq_params is None:
            out = self._attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out.permute(2, 0, 1, 3).flatten(2)
        context = ContextPart(parallel_state.get_context_parallel_rank(), self.config.context_parallel_size)
        if context.ranks > 1:
            parts = _pieces(query, key, value, packed_seq_params.cu_seqlens_q.diff().tolist(), context)
        else:
            spans = _spans(packed_seq_params, len(query))
            plain = self.tokens_before is None and self.softcap is None and not (self.training and self.dropout)
            if plain and query.device.type == "cpu":
                return packed_attention(query, key, value, spans, self.softmax_scale).flatten(1)
            parts = _parts(query, key, value, spans)
        out = [self._attend(*(x.transpose(0, 1)[None] for x in part)) for part in parts]
        return torch.cat([x[0].transpose(0, 1) for x in out]).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return causal_attention(
            query,
            key,
            value,
            self.softmax_scale,
            self.tokens_before,
            self.softcap,
            self.dropout if self.training else 0.0,
        )

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Nothing to save: attention has no parameters."""
        return {}


def _spans(packed: PackedSeqParams, length: int) -> list[Span]:
    """Sequences of the row, or of each pair prompt and chosen response, then the rejected response; last the padding."""
    if not isinstance(packed, SharedPrompts):
        return [Span(tokens) for tokens in packed.cu_seqlens_q.diff().tolist()]
    spans = [
        span for prompt, chosen, rejected in packed.pairs for span in (Span(prompt + chosen), Span(rejected, prompt))
    ]
    padding = length - sum(span.tokens for span in spans)
    return [*spans, Span(padding)] if padding else spans


def _parts(query: Tensor, key: Tensor, value: Tensor, spans: list[Span]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each span the queries, and the keys and values that they see."""
    of_each = list(zip(*(x.split([span.tokens for span in spans]) for x in (query, key, value))))
    for span, before, (q, k, v) in zip(spans, [None, *of_each], of_each):
        if span.prompt:
            k, v = (torch.cat([x[: span.prompt], own]) for x, own in zip(before[1:], (k, v)))
        yield q, k, v


def _pieces(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], context: ContextPart
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of each sequence this rank's two pieces of the queries, each with all keys and values up to its end."""
    lengths = [length // context.ranks for length in lengths]
    group = parallel_state.get_context_parallel_group()
    key, value = (
        gather_from_sequence_parallel_region(x, group=group).unflatten(0, (context.ranks, -1)) for x in (key, value)
    )
    for q, k, v in zip(query.split(lengths), key.split(lengths, 1), value.split(lengths, 1)):
        k, v = context.whole(k), context.whole(v)
        for piece, number in zip(q.chunk(2), context.pieces):
            end = (number + 1) * len(piece)
            yield piece, k[:end], v[:end]
