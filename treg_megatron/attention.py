"""Attention that no fused kernel knows: which keys a query sees, and scores with a soft-cap."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_mask(queries: int, length: int, tokens_before: int | None, device: torch.device) -> Tensor:
    """[queries, s] bool, True where a query (row) sees a key: itself and the tokens before it, at most
    ``tokens_before`` (None: all). The queries are those of the last positions."""
    position = torch.arange(length, device=device)
    distance = position[length - queries:, None] - position
    return (distance >= 0) & (distance <= (length if tokens_before is None else tokens_before))


def soft_capped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float,
                          dropout: float = 0.0) -> Tensor:
    """Attention on c * tanh(scores / c), scores and softmax in fp32.

    [b, heads, q, d], [b, groups, s, d], mask [q, s] -> [b, heads, q, d].
    """
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = (grouped @ key[:, :, None].transpose(-1, -2)).float() * scale
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~mask, -torch.inf)
    weights = F.dropout(scores.softmax(-1).type_as(value), dropout)
    return (weights @ value[:, :, None]).flatten(1, 2)
