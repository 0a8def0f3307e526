"""Causal attention over a packed sequence in one call of torch's variable-length flash attention, on GPUs.

With one call per sequence, kernels grow with the pairs of a micro-batch. ``torch.nn.attention.varlen`` exists from
torch 2.10 on; where it is missing or another version takes other arguments, sequences are computed one by one.
"""

import inspect
from functools import cache

import torch
from torch import Tensor

from treg_megatron.kernels.core_attention import PackedRow, SdpaAttention

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

LARGEST_HEAD = 256  # channels, flash attention's limit
_ARGUMENTS = {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale", "window_size", "enable_gqa"}


class VarlenAttention(SdpaAttention):
    """Packed sequences in one call, in half precision and without soft-cap, dropout or shared prefixes."""

    def attend_packed(self, query: Tensor, key: Tensor, value: Tensor, packed: PackedRow) -> Tensor:
        """Queries [t, heads, d], keys and values [t, groups, d] -> [t, heads * d]."""
        plain = self.softcap is None and not (self.training and self.dropout)
        if not plain or packed.ends is None or not has_kernel(query):
            return super().attend_packed(query, key, value, packed)
        return varlen_attn(
            query,
            key,
            value,
            packed.ends,
            packed.ends,
            packed.max_seqlen_q,
            packed.max_seqlen_kv,
            scale=self.softmax_scale,
            window_size=(-1 if self.tokens_before is None else self.tokens_before, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        ).flatten(1)


def has_kernel(query: Tensor) -> bool:
    """Whether torch's kernel takes queries of this device, precision and number of channels."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and query.shape[-1] <= LARGEST_HEAD and _arguments_are_known()


@cache
def _arguments_are_known() -> bool:
    return varlen_attn is not None and _ARGUMENTS <= inspect.signature(varlen_attn).parameters.keys()
