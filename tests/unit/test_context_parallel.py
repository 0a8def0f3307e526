"""Sequences split over context-parallel ranks: every token is on exactly one rank, at the expected position."""

import numpy as np
import pytest
import torch

from treg_megatron.data.aligned import PairRecord
from treg_megatron.data.collate import collate
from treg_megatron.distributed.context_parallel import WHOLE, ContextPart


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("length", [8, 16, 40])
def test_every_token_is_on_one_rank(ranks, length):
    parts = [ContextPart(rank, ranks) for rank in range(ranks)]
    sequence, positions = torch.arange(length) + 100, np.arange(length)
    held = [part.of(sequence) for part in parts]
    assert sorted(torch.cat(held).tolist()) == sequence.tolist()
    for part, tokens in zip(parts, held):
        mine = positions[part.holds(positions, length)]
        assert tokens[part.row(mine, length)].tolist() == (mine + 100).tolist()
        assert len(tokens) == length // ranks and len(mine) == len(tokens)


@pytest.mark.parametrize("ranks", [2, 4])
def test_joined_is_the_inverse_of_of(ranks):
    sequence = torch.arange(16 * 3).view(16, 3)
    assert torch.equal(
        ContextPart(0, ranks).joined(
            torch.stack(
                [
                    torch.stack([ContextPart(rank, ranks).of(column) for column in sequence.T], dim=1)
                    for rank in range(ranks)
                ]
            )
        ),
        sequence,
    )


def test_first_and_last_chunk_are_on_the_same_rank():
    assert ContextPart(0, 2).of(torch.arange(8)).tolist() == [0, 1, 6, 7]
    assert ContextPart(1, 2).of(torch.arange(8)).tolist() == [2, 3, 4, 5]
    assert WHOLE.of(torch.arange(3)).tolist() == [0, 1, 2] and WHOLE.padded(3) == 3
    assert ContextPart(0, 2).padded(9) == 12


def responses_of(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([response for response, length in enumerate(lengths) for _ in range(length)])


def test_the_micro_batches_of_the_ranks_hold_each_response_token_once():
    chance = np.random.default_rng(5)

    def record(name: str, prompt: int, *responses: int) -> PairRecord:
        tokens = [chance.integers(1, 99, prompt + n).astype(np.int32) for n in responses]
        values = [chance.random(n).astype(np.float32) for n in (*responses, *responses)]
        return PairRecord(name, *tokens, *values)

    records = [record("a", 5, 7, 1), record("b", 2, 3, 12)]
    unsplit = collate(records, "packed")
    parts = [collate(records, "packed", 16, ContextPart(rank, 2)) for rank in range(2)]
    for name in ("targets", "token_rewards", "ref_logps"):
        assert sorted(torch.cat([part[name] for part in parts]).tolist()) == sorted(unsplit[name].tolist())
    assert [sum(n) for n in zip(*(part["lengths"] for part in parts))] == unsplit["lengths"]
    assert all(part["response_tokens"].tolist() == unsplit["lengths"] for part in parts), "of whole responses"
    assert all(torch.equal(part["segments"], responses_of(part["lengths"])) for part in parts)
    assert all(torch.equal(part["cu_seqlens"], parts[0]["cu_seqlens"]) for part in parts)
    for part in parts:
        assert part["tokens"].shape[1] * 2 == part["cu_seqlens"][-1] and part["tokens"].shape[1] % 8 == 0
    # a row has the token before its target; the position distinguishes tokens of the unsplit batch
    by_target = dict(zip(zip(unsplit["targets"].tolist(), unsplit["token_rewards"].tolist()), unsplit["rows"].tolist()))
    for part in parts:
        for target, reward, row in zip(part["targets"].tolist(), part["token_rewards"].tolist(), part["rows"].tolist()):
            before = by_target[target, reward]
            assert part["tokens"][0, row] == unsplit["tokens"][0, before]
            assert part["position_ids"][0, row] == unsplit["position_ids"][0, before]
