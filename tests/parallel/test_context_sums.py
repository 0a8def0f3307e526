"""Responses split over context-parallel ranks: the loss and each rank's gradient equal those without a split."""

import dataclasses

import pytest
import torch
import torch.distributed as dist

from tests.support.forked import run_ranks
from tests.support.objectives import PLAIN_DPO
from treg_megatron.objective import Responses, preference_loss, segments_and_places

LENGTHS = [6, 3, 1, 8]


def tokens() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(11)
    logps = -torch.rand(sum(LENGTHS), generator=generator) * 4
    return (
        logps,
        logps + torch.randn(len(logps), generator=generator),
        torch.rand(len(logps), generator=generator) - 0.5,
    )


def part_of(rank: int, size: int) -> tuple[list[int], list[int]]:
    """Tokens that a rank holds, and their number per response: every ``size``-th token, so some ranks hold none."""
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    mine = [list(range(start + rank, start + length, size)) for start, length in zip(starts, LENGTHS)]
    return sum(mine, []), [len(m) for m in mine]


def loss_on_this_rank(objective) -> tuple:
    dist.init_process_group("gloo")
    mine, lengths = part_of(dist.get_rank(), dist.get_world_size())
    logps, ref_logps, rewards = (x[mine] for x in tokens())
    logps.requires_grad_()
    whole = torch.tensor(LENGTHS, dtype=torch.float32)
    responses = Responses(lengths, *segments_and_places(lengths), whole, dist.group.WORLD)
    loss, sums = preference_loss(logps, ref_logps, rewards, responses, objective)
    loss.backward()
    return loss.detach(), {k: v.item() for k, v in sums.items()}, logps.grad


@pytest.mark.parametrize(
    "changes",
    [
        dict(alpha=0.5),
        dict(loss_type="simpo", beta=2.0, gamma=0.6, alpha=0.5),
        dict(loss_type="dpo_norm", beta=2.0, alpha=0.5),
        dict(loss_type="ipo"),
        dict(alpha=0.5, token_rewards="implicit"),
        dict(token_values="margin", token_weight="confident"),
        dict(token_values="margin", token_weight="confident", loss_type="simpo", beta=2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_split_responses_equal_unsplit_ones(changes, ranks):
    objective = dataclasses.replace(PLAIN_DPO, **changes)
    logps, ref_logps, rewards = tokens()
    logps.requires_grad_()
    loss, sums = preference_loss(logps, ref_logps, rewards, Responses.whole(LENGTHS), objective)
    loss.backward()
    for rank, (its_loss, its_sums, its_grad) in enumerate(run_ranks(ranks, loss_on_this_rank, objective)):
        torch.testing.assert_close(its_loss, loss.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(its_grad, logps.grad[part_of(rank, ranks)[0]], rtol=1e-5, atol=1e-7)
        assert its_sums == pytest.approx({k: v.item() for k, v in sums.items()}, rel=1e-4, abs=1e-5)
