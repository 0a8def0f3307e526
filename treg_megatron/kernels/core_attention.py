"""Megatron's core attention, built on ``scaled_dot_product_attention``, for padded batches and packed sequences."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from treg_megatron.kernels.attention import Span, causal_attention


@dataclass
class PackedRow(PackedSeqParams):
    """A packed sequence for layers in plain PyTorch. The host knows the lengths, so that no layer reads ``cu_seqlens``
    from the device and waits for it; rotary angles are those of the position ids."""

    sequences: list[int] | None = None  # tokens of each, before they are split over context-parallel ranks
    ends: Tensor | None = None  # [sequences + 1] int32 on the device: 0, and where each ends; not Megatron's field


@dataclass
class SharedPrompts(PackedRow):
    """A packed sequence of pairs that hold their prompt once."""

    pairs: list[tuple[int, int, int]] | None = None  # tokens of prompt, chosen, rejected; what follows is padding


class SdpaAttention(MegatronModule):
    """Causal grouped-query attention, built on ``scaled_dot_product_attention``.

    Packed sequences (THD) are processed one by one: this gives block-diagonal attention without a mask, and no work is
    spent between sequences. If a pair holds its prompt once, its rejected response attends to the prompt and to itself.

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
        return self.attend_each(parts_of(query, key, value, spans_of(packed, len(query))))

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


def spans_of(packed: PackedRow, length: int) -> list[Span]:
    """The spans of a packed row: one per sequence or, with shared prompts, two per pair (prompt with chosen response,
    then rejected response) and one for the padding.

    Args:
        length: number of tokens, padding included.
    """
    if not isinstance(packed, SharedPrompts):
        return [Span(tokens) for tokens in packed.sequences]
    spans = [
        span for prompt, chosen, rejected in packed.pairs for span in (Span(prompt + chosen), Span(rejected, prompt))
    ]
    padding = length - sum(span.tokens for span in spans)
    return [*spans, Span(padding)] if padding else spans


def parts_of(query: Tensor, key: Tensor, value: Tensor, spans: list[Span]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each span, its queries and the keys and values that they see."""
    own = list(zip(*(x.split([span.tokens for span in spans]) for x in (query, key, value)), strict=True))
    for span, before, (q, k, v) in zip(spans, [None, *own], own, strict=False):
        if span.prompt:
            k, v = (torch.cat([x[: span.prompt], y]) for x, y in zip(before[1:], (k, v), strict=True))
        yield q, k, v
