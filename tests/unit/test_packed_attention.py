"""A packed row in one call against its sequences one by one, with full score matrices in float64."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.test_attention import CHANNELS, GROUPS, HEADS, SCALE, plain
from treg_megatron.kernels.attention import Span
from treg_megatron.kernels.packed_attention import packed_attention

sequences = st.builds(lambda n: [Span(n)], st.integers(1, 9))
pairs = st.builds(
    lambda prompt, chosen, rejected: [Span(prompt + chosen), Span(rejected, prompt)],
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 9),
)


def one_by_one(query, key, value, spans):
    parts, start, before = [], 0, 0
    for tokens, prompt in spans:
        own = slice(start, start + tokens)
        k, v = (torch.cat([x[before : before + prompt], x[own]]) for x in (key, value))
        parts.append(plain(*(x.transpose(0, 1)[None] for x in (query[own], k, v)))[0].transpose(0, 1))
        before, start = start, start + tokens
    return torch.cat(parts)


@given(row=st.lists(st.one_of(sequences, pairs), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_equals_sequences_one_by_one(row, seed):
    spans = sum(row, [])
    tokens = sum(span.tokens for span in spans)
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(tokens, n, CHANNELS, generator=generator).requires_grad_() for n in (HEADS, GROUPS, GROUPS)]
    upstream = torch.randn(tokens, HEADS, CHANNELS, generator=generator)
    results = []
    for out in (packed_attention(*tensors, spans, SCALE), one_by_one(*tensors, spans)):
        results.append((out, *torch.autograd.grad((out * upstream).sum(), tensors)))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-5, atol=1e-6)
