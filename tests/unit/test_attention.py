"""Attention with fused kernels against the full score matrix in float64."""

import pytest
import torch

from treg_megatron.kernels.attention import causal_attention

HEADS, GROUPS, CHANNELS, SCALE = 4, 2, 8, 0.3


def plain(query, key, value, tokens_before=None, softcap=None):
    query, key, value = (x.double() for x in (query, key, value))
    key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    queries, length = scores.shape[-2:]
    for q in range(queries):
        own = length - queries + q
        for k in range(length):
            if k > own or tokens_before is not None and k < own - tokens_before:
                scores[..., q, k] = -torch.inf
    return scores.softmax(-1) @ value


@pytest.mark.parametrize(
    "options",
    [{}, {"tokens_before": 3}, {"tokens_before": 40}, {"softcap": 2.0}, {"softcap": 2.0, "tokens_before": 3}],
    ids=str,
)
@pytest.mark.parametrize("queries, length", [(9, 9), (8, 9), (5, 9), (4, 9), (1, 9), (1, 1)])
def test_equals_the_full_score_matrix(queries, length, options):
    generator = torch.Generator().manual_seed(queries)
    tensors = [
        torch.randn(2, n, s, CHANNELS, generator=generator).requires_grad_()
        for n, s in ((HEADS, queries), (GROUPS, length), (GROUPS, length))
    ]
    upstream = torch.randn(2, HEADS, queries, CHANNELS, generator=generator)
    results = []
    for attention in (lambda *x: causal_attention(*x, scale=SCALE, **options), lambda *x: plain(*x, **options)):
        out = attention(*tensors)
        results.append((out, *torch.autograd.grad((out * upstream).sum(), tensors)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)
