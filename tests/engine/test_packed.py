"""What Transformer Engine's attention is told about a packed row, by its own checks and its own arithmetic.

Each test holds one rule; the numbers of issues are those of NVIDIA/TransformerEngine.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.forked import run_ranks
from treg_megatron.data.aligned import PairRecord
from treg_megatron.data.collate import collate, row_multiple
from treg_megatron.distributed.context_parallel import ContextPart

HEADS, GROUPS, CHANNELS = 4, 2, 8
#: tokens of prompt, chosen and rejected response: none of the sequences is a multiple of what two ranks divide it by
PAIRS = ((5, 6, 2), (4, 3, 29), (3, 8, 2))


def batch_of(rank: int, ranks: int, pairs=PAIRS, multiple: int = 1) -> dict[str, Any]:
    """A packed micro-batch, as the data module makes it for a context-parallel rank."""
    parallel = SimpleNamespace(context=ranks, tensor=2, sequence=True)
    multiple = row_multiple(SimpleNamespace(pad_to_multiple_of=multiple), parallel)
    records = [
        PairRecord(
            str(number),
            *(np.arange(1, prompt + response + 1, dtype=np.int32) for response in responses),
            *(np.ones(response, dtype=np.float32) for response in responses),
            None,
            None,
        )
        for number, (prompt, *responses) in enumerate(pairs)
    ]
    return collate(records, "packed", multiple, ContextPart(rank, ranks))


def packed_of(batch: dict[str, Any]):
    """The parameters that the policy's forward step passes on to Transformer Engine's layers."""
    from treg_megatron.models.policy import forward_step

    seen = []

    def model(*args, packed_seq_params, **kwargs):
        seen.append(packed_seq_params)

    model.config = SimpleNamespace(torch_layers=False)
    forward_step(model, batch)
    return seen[0]


CASES = [(ranks, pairs, multiple) for ranks in (1, 2, 4) for pairs in (PAIRS, ()) for multiple in (1, 16, 128)]


@pytest.fixture(params=CASES, ids=lambda c: f"CP{c[0]}, {len(c[1])} pairs, multiple of {c[2]}")
def case(request):
    ranks, pairs, multiple = request.param
    batches = [batch_of(rank, ranks, pairs, multiple) for rank in range(ranks)]
    return ranks, batches, [packed_of(batch) for batch in batches]


def test_real_and_padded_ends_are_one_tensor(case):
    """3331, 3487: with two it guesses whether there is padding, and the host waits for the GPU to compare them."""
    for packed in case[2]:
        ends = packed.cu_seqlens_q
        assert packed.qkv_format == "thd" and ends.dtype == torch.int32
        assert packed.cu_seqlens_kv is packed.cu_seqlens_q_padded is packed.cu_seqlens_kv_padded is ends


def test_the_ends_cover_all_tokens(case):
    """2892: padding outside of the sequences, or ends beyond the row, differ from what rotary embedding and sequence
    parallelism see. Here the padding of a row is a sequence of its own."""
    ranks, batches, all_packed = case
    for batch, packed in zip(batches, all_packed, strict=True):
        assert packed.cu_seqlens_q[0] == 0 and packed.cu_seqlens_q[-1] == batch["tokens"].numel() * ranks
        assert (packed.cu_seqlens_q.diff() > 0).all()


def test_the_longest_sequence_is_a_number_of_the_whole(case):
    """Before ranks share it, and no tensor: rotary angles are made for it, and backends are chosen by it."""
    for packed in case[2]:
        longest = packed.cu_seqlens_q.diff().max().item()
        for found in (packed.max_seqlen_q, packed.max_seqlen_kv):
            assert type(found) is int and found == longest


def ends_by_halves(ends: torch.Tensor, padded: torch.Tensor, ranks: int) -> bool:
    """Whether its short cut, ends divided by ranks, gives what its exact arithmetic gives for every rank and half."""
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    exact = context_parallel.get_cu_seqlens_on_cp_rank
    return all(
        torch.equal(exact(ends, padded // ranks, ranks, rank, *halves), ends // (ranks * (3 - sum(halves))))
        for rank in range(ranks)
        for halves in ((True, True), (True, False), (False, True))
    )


def test_sequences_divide_among_ranks(case):
    """1930, 3331: it divides the ends by the ranks, and silently drops tokens of sequences that do not divide."""
    ranks, _, all_packed = case
    for packed in all_packed:
        assert ranks == 1 or (packed.cu_seqlens_q.diff() % (2 * ranks) == 0).all()
        assert ranks == 1 or ends_by_halves(packed.cu_seqlens_q, packed.cu_seqlens_q_padded, ranks)


def test_sequences_that_do_not_divide_would_be_wrong():
    """The short cut that the test above holds is one: with real ends before padded ones it drops tokens."""
    ends, padded = torch.tensor([0, 7, 14], dtype=torch.int32), torch.tensor([0, 8, 16], dtype=torch.int32)
    assert not ends_by_halves(ends, padded, 2) and ends_by_halves(padded, padded, 2)


def test_rotary_angles_are_those_of_the_positions(case):
    """Its rotary embedding finds each token's position by the ends alone; the row's position ids say the same."""
    from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb

    ranks, batches, all_packed = case
    for rank, (batch, packed) in enumerate(zip(batches, all_packed, strict=True)):
        x = torch.randn(batch["tokens"].numel(), HEADS, CHANNELS, generator=torch.Generator().manual_seed(rank))
        turns = torch.arange(packed.max_seqlen_q)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
        angles = torch.cat([turns, turns], dim=-1)[:, None, None]  # [s, 1, 1, channels]
        options = {"cu_seqlens": packed.cu_seqlens_q_padded, "cp_size": ranks, "cp_rank": rank}
        found = apply_rotary_pos_emb(x, angles, tensor_format="thd", fused=False, **options)
        own = angles[batch["position_ids"][0], 0]
        rotated = torch.cat([-x[..., CHANNELS // 2 :], x[..., : CHANNELS // 2]], dim=-1)
        torch.testing.assert_close(found, x * own.cos() + rotated * own.sin())


class Chosen(Exception):
    """Transformer Engine has checked its arguments and asks which backend computes."""


def seen_by_the_choice(ranks: int, window: tuple[int, int] | None) -> dict[str, Any]:
    """What Megatron's attention on this context-parallel rank passes to the choice of a backend, all checks done."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.extensions.transformer_engine import TEDotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

    from tests.support.engine import on_an_h100
    from treg_megatron.utils.substitute import substituted

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=ranks)
    rank = parallel_state.get_context_parallel_rank()
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * CHANNELS,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        window_size=window,
        context_parallel_size=ranks,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    batch = batch_of(rank, ranks)
    length = batch["tokens"].numel()
    query, key, value = (torch.zeros(length, n, CHANNELS, dtype=torch.bfloat16) for n in (HEADS, GROUPS, GROUPS))

    def choose(parameters):
        seen.append(parameters)
        raise Chosen

    seen: list[Any] = []
    with (
        on_an_h100(),
        substituted(torch.Tensor, "is_cuda", True),
        substituted(dot_product_attention.dpa_utils, "get_attention_backend", choose),
    ):
        attention = TEDotProductAttention(config, 1, AttnMaskType.causal, "self")
        with pytest.raises(Chosen):
            attention(query, key, value, None, AttnMaskType.causal, packed_seq_params=packed_of(batch))
    dist.barrier()  # the first rank holds the store
    names = (
        *("qkv_layout", "attn_mask_type", "pad_between_seqs", "max_seqlen_q", "max_seqlen_kv"),
        *("batch_size", "window_size", "context_parallel", "num_gqa_groups"),
    )
    return {name: getattr(seen[0], name) for name in names}


@pytest.mark.parametrize("window", [None, (5, 0)], ids=["all", "window"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_its_own_checks_pass(ranks, window):
    """1005, 3331: causal within each sequence, no padding found between them, whatever the layout."""
    ends = batch_of(0, ranks)["cu_seqlens"]
    longest = ends.diff().max().item()
    expected = {
        "qkv_layout": "thd_thd_thd",
        "attn_mask_type": "padding_causal",
        "pad_between_seqs": False,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
        "batch_size": len(ends) - 1,
        "window_size": window or (-1, 0),
        "context_parallel": ranks > 1,
        "num_gqa_groups": GROUPS,
    }
    assert run_ranks(ranks, seen_by_the_choice, ranks, window) == [expected] * ranks
