"""Rows that hold each pair's prompt once: every response token is predicted by the token before it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.data.aligned import PairRecord
from treg_megatron.data.collate import collate
from treg_megatron.distributed.layout import require_layout
from treg_megatron.errors import UserError

FIELDS = {"num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 8, "num_layers": 4, "seq_length": 512}

sizes = st.integers(1, 9)


def record(name: str, prompt: int, chosen: int, rejected: int) -> PairRecord:
    chance = np.random.default_rng([prompt, chosen, rejected])
    question = chance.integers(1, 99, prompt)
    tokens = [np.concatenate([question, chance.integers(1, 99, n)]).astype(np.int32) for n in (chosen, rejected)]
    return PairRecord(name, *tokens, *(chance.random(n).astype(np.float32) for n in (chosen, rejected) * 2))


@given(shapes=st.lists(st.tuples(sizes, sizes, sizes), max_size=4), multiple=st.sampled_from([1, 8]))
def test_rows_point_at_the_token_before_each_response_token(shapes, multiple):
    records = [record(str(i), *shape) for i, shape in enumerate(shapes)]
    shared, packed = (collate(records, "packed", multiple, share_prompts=share) for share in (True, False))
    for name in ("targets", "token_rewards", "ref_logps"):
        assert torch.equal(shared[name], packed[name])
    for name in ("tokens", "position_ids"):
        assert torch.equal(shared[name][0, shared["rows"]], packed[name][0, packed["rows"]])
    assert shared["lengths"] == packed["lengths"]
    tokens = sum(map(sum, shapes))
    padding = shared["tokens"].shape[1] - tokens
    spans = [
        span
        for i, (prompt, chosen, rejected) in enumerate(shapes)
        for span in ((prompt + chosen, ()), (rejected, ((2 * i, prompt),)))
    ]
    assert shared["spans"] == [*spans, (padding, ())][: len(spans) + bool(padding)]
    assert tokens <= shared["tokens"].shape[1] < max(tokens, 1) + multiple
    assert (
        shared["tokens"].shape == shared["position_ids"].shape and shared["max_seqlen"] > shared["position_ids"].max()
    )


@pytest.mark.parametrize(
    "overrides, experts", [(["data.layout=padded"], None), (["parallel.context=2"], None), ([], 8)]
)
def test_where_prompts_cannot_be_shared(overrides, experts):
    recipe = load_recipe("recipes/tiny.yaml", ["data.share_prompts=true", *overrides])
    with pytest.raises(
        UserError, match="data.share_prompts computes the prompt of each pair once in a packed sequence"
    ):
        require_layout(FIELDS | {"num_moe_experts": experts}, section(recipe, "parallel"), section(recipe, "data"), 2)
