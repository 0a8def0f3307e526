"""Megatron's core attention, built on ``scaled_dot_product_attention``, for padded batches and packed sequences."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from treg_megatron.kernels.attention import Span, causal_attention, parts_of


@dataclass
class PackedRow(PackedSeqParams):
    """A packed sequence for layers in plain PyTorch. The host knows the lengths, so that no layer reads ``cu_seqlens``
    from the device and waits for it; rotary angles are those of the position ids.

    Attributes:
        spans: they cover all tokens, padding included, before these are split over context-parallel ranks.
        ends: [spans + 1] int32 on the device: 0, and where each span ends, if none has a prefix; not Megatron's field.
        masks: a cache, filled by attention in the first layer.
    """

    spans: list[Span] = field(default_factory=list)
    ends: Tensor | None = None
    masks: dict[Any, Tensor] = field(default_factory=dict)


class SdpaAttention(MegatronModule):
    """Causal grouped-query attention, built on ``scaled_dot_product_attention``.

    The spans of packed sequences (THD) are processed one by one: this gives block-diagonal attention without a mask,
    and no work is spent between sequences. A span that shares its prefix with others attends to it and to itself.

    Two config options have no fused kernel: a sliding window (``window_size``, in the layers that
    ``window_attn_skip_freq`` selects) needs a mask if a sequence is longer than the window, and a soft-cap on the
    scores (``attn_logit_softcapping``) needs the full score matrix of a sequence in fp32.
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
        packed_seq_params: PackedRow | None = None,
    ) -> Tensor:
        """[s, b, heads, d] -> [s, b, heads * d], or packed, [t, heads, d] -> [t, heads * d]."""
        if packed_seq_params is None:
            out = self.attend(*(x.permute(1, 2, 0, 3) for x in (query, key, value)))
            return out.permute(2, 0, 1, 3).flatten(2)
        return self.attend_packed(query, key, value, packed_seq_params)

    def attend_packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedRow) -> Tensor:
        """Queries [t, heads, d], keys and values [t, groups, d] -> [t, heads * d]."""
        return self.attend_each(parts_of(query, key, value, packed.spans))

    def attend_each(self, parts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Attend each part on its own: queries, keys, values of consecutive tokens, [n, heads, d] -> [t, heads * d]."""
        out = [self.attend(*(x.transpose(0, 1)[None] for x in part)) for part in parts]
        return torch.cat([x[0].transpose(0, 1) for x in out]).flatten(1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries [b, heads, q, d], keys and values [b, groups, s, d] -> [b, heads, q, d]."""
        dropout = self.dropout if self.training else 0.0
        return causal_attention(query, key, value, self.softmax_scale, self.tokens_before, self.softcap, dropout)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Nothing to save: attention has no parameters."""
        return {}
