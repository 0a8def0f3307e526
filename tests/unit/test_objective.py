"""The objective against its formulas, written independently in plain float64 Python."""

import dataclasses
import math

import pytest
import torch

from tests.support.objectives import PLAIN_DPO, VARIANTS
from treg_megatron.errors import UserError
from treg_megatron.objective import Objective, Responses, by_halves, means, one_by_one, preference_loss

LENGTHS = [3, 5, 7, 2, 1, 1]


def objective(**changes) -> Objective:
    return dataclasses.replace(PLAIN_DPO, **changes)


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(3)
    n = sum(LENGTHS)
    logps = -torch.rand(n, generator=generator) * 5
    return logps, logps + torch.randn(n, generator=generator), torch.rand(n, generator=generator) - 0.5


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def formula(o: Objective, logps, ref_logps, rewards) -> float:
    """docs/METHOD.md, pair by pair and token by token, in float64."""
    total, at = 0.0, 0
    for pair in range(len(LENGTHS) // 2):
        sides = []
        for n in LENGTHS[2 * pair : 2 * pair + 2]:
            lp, ref, r = (x[at : at + n].double().tolist() for x in (logps, ref_logps, rewards))
            at += n
            beta = o.beta / n if o.loss_type in ("simpo", "dpo_norm") else o.beta
            ratio = lp if o.loss_type in ("simpo", "sft") else [a - b for a, b in zip(lp, ref)]
            if o.token_rewards == "implicit":
                r = [sigmoid(x) - 0.5 for x in ratio]
            sides.append(
                {
                    "reward": beta * sum(ratio),
                    "reg": -beta * sum(a * b for a, b in zip(r, lp)),
                    "mean_ratio": sum(ratio) / n,
                    "logp": sum(lp),
                }
            )
        chosen, rejected = sides
        margin = chosen["reward"] - rejected["reward"]
        if o.loss_type == "ipo":
            loss = (chosen["mean_ratio"] - rejected["mean_ratio"] - 1 / (2 * o.beta)) ** 2
        elif o.loss_type == "sft":
            loss = -chosen["logp"]
        else:
            eps = o.label_smoothing
            loss = -(1 - eps) * math.log(sigmoid(margin - o.gamma)) - eps * math.log(sigmoid(o.gamma - margin))
        weight = 1.0 if o.weight == "static" else sigmoid((o.gamma if o.weight_margin else 0.0) - margin)
        loss += o.alpha * weight * (chosen["reg"] + rejected["reg"]) - o.sft_loss_weight * chosen["logp"]
        total += loss
    return total


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_loss_is_the_formula(tokens, changes):
    o = objective(**changes)
    loss, _ = preference_loss(*tokens, Responses.whole(LENGTHS), o)
    assert loss.item() == pytest.approx(formula(o, *tokens), rel=2e-6)


@pytest.mark.parametrize("preference, beta, gamma", [("dpo", 0.1, 0.0), ("dpo_norm", 2.0, 0.0), ("simpo", 2.0, 0.6)])
def test_gradient_identity(tokens, preference, beta, gamma):
    """dL/dlog pi(y_w,t) = -beta w (1 + alpha r_t), dL/dlog pi(y_l,t) = beta w (1 - alpha r_t)."""
    logps, ref_logps, rewards = tokens
    logps = logps.requires_grad_()
    alpha = 0.5
    preference_loss(
        logps,
        ref_logps,
        rewards,
        Responses.whole(LENGTHS),
        objective(loss_type=preference, beta=beta, gamma=gamma, alpha=alpha),
    )[0].backward()
    at = 0
    for pair in range(len(LENGTHS) // 2):
        spans, reward = [], []
        for n in LENGTHS[2 * pair : 2 * pair + 2]:
            span = slice(at, at + n)
            at += n
            per_token = beta if preference == "dpo" else beta / n
            ratio = logps[span] if preference == "simpo" else logps[span] - ref_logps[span]
            spans.append((span, per_token))
            reward.append(per_token * ratio.detach().double().sum().item())
        w = sigmoid(reward[1] - reward[0] + gamma)
        for (span, per_token), sign in zip(spans, (-1, 1)):
            expected = sign * per_token * w * (1 - sign * alpha * rewards[span])
            torch.testing.assert_close(logps.grad[span], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("nothing", [dict(alpha=0.0), dict(alpha=0.7)])
def test_without_alpha_or_rewards_it_is_dpo_bit_for_bit(tokens, nothing):
    logps, ref_logps, rewards = tokens
    results = []
    for o, r in (
        (objective(token_rewards="none"), None),
        (objective(**nothing), rewards if nothing["alpha"] == 0 else torch.zeros_like(rewards)),
    ):
        leaf = logps.clone().requires_grad_()
        loss, _ = preference_loss(leaf, ref_logps, r, Responses.whole(LENGTHS), o)
        loss.backward()
        results.append((loss, leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_pair_has_the_same_bits_in_any_company(tokens):
    logps, ref_logps, rewards = tokens
    o = objective(alpha=0.5)
    alone = [
        preference_loss(*(x[a:b] for x in tokens), Responses.whole(LENGTHS[i : i + 2]), o)[0]
        for i, (a, b) in zip((0, 2, 4), ((0, 8), (8, 17), (17, 19)))
    ]
    together, _ = preference_loss(logps, ref_logps, rewards, Responses.whole(LENGTHS), o)
    assert torch.equal(torch.stack(alone).sum(), together)


def test_sums_in_few_kernels_are_those_of_torch_and_the_same_in_any_company(tokens):
    """On a GPU: no kernel per response, and no bit of a response's sum depends on the other responses."""
    together = by_halves(torch.stack(tokens), Responses.whole(LENGTHS))
    torch.testing.assert_close(together, one_by_one(torch.stack(tokens), LENGTHS))
    for response, part in enumerate(zip(*(x.split(LENGTHS) for x in tokens), strict=True)):
        alone = by_halves(torch.stack(part), Responses.whole([LENGTHS[response]]))
        assert torch.equal(alone[:, 0], together[:, response])
    assert by_halves(torch.zeros(3, 0), Responses.whole([])).shape == (3, 0)
    assert torch.equal(by_halves(torch.ones(1, 2), Responses.whole([0, 2, 0])), torch.tensor([[0.0, 2.0, 0.0]]))


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_loss_stays_where_its_values_are(tokens, changes):
    """Nothing is read from or copied to the device of the log-probs; meta tensors refuse both, as NCCL and a stream
    that must not wait would."""
    meta = [x.to("meta").requires_grad_() for x in tokens]
    responses = Responses.whole(LENGTHS)
    on_meta = {name: getattr(responses, name).to("meta") for name in ("segments", "places", "tokens")}
    loss, sums = preference_loss(*meta, dataclasses.replace(responses, **on_meta), objective(**changes))
    loss.backward()
    assert all(x.is_meta for x in (loss, meta[0].grad, *sums.values()))


def test_a_policy_that_is_its_reference_has_the_known_loss(tokens):
    logps, _, rewards = tokens
    for o in (
        objective(alpha=0.5),
        objective(label_smoothing=0.2),
        objective(loss_type="dpo_norm"),
        objective(loss_type="ipo"),
    ):
        _, sums = preference_loss(logps, logps, rewards, Responses.whole(LENGTHS), o)
        assert means({k: v.item() for k, v in sums.items()})["loss/preference"] == pytest.approx(
            o.first_preference_loss, abs=1e-6
        )


def test_no_pairs_give_no_loss_and_a_gradient_of_zero():
    hidden = torch.ones(3, requires_grad=True)
    loss, sums = preference_loss(hidden[:0], hidden[:0], hidden[:0], Responses.whole([]), objective(alpha=0.5))
    loss.backward()
    assert loss == 0 and sums["pairs"] == 0 and torch.equal(hidden.grad, torch.zeros(3))


def test_metrics_count_tokens_where_they_are_about_tokens(tokens):
    _, sums = preference_loss(*tokens, Responses.whole(LENGTHS), objective(alpha=2.0))
    metrics = means({k: v.item() for k, v in sums.items()})
    rewards = tokens[2].split(LENGTHS)
    assert metrics["treg/token_reward_chosen"] == pytest.approx(torch.cat(rewards[0::2]).mean().item(), rel=1e-5)
    assert metrics["treg/factor_outside_quarter"] == pytest.approx((tokens[2].abs() > 0.125).float().mean().item())
    assert metrics["rewards/margins"] == pytest.approx(
        metrics["rewards/chosen"] - metrics["rewards/rejected"], rel=1e-4
    )


@pytest.mark.parametrize(
    "changes",
    [
        dict(beta=0.0),
        dict(gamma=0.5),
        dict(label_smoothing=0.5),
        dict(alpha=2.1),
        dict(alpha=-0.1),
        dict(sft_loss_weight=-1.0),
        dict(loss_type="ipo", alpha=0.5),
        dict(loss_type="ipo", label_smoothing=0.1),
        dict(alpha=0.5, token_rewards="none"),
        dict(loss_type="simpo", token_rewards="implicit"),
        dict(loss_type="sft", alpha=0.5),
        dict(loss_type="sft", sft_loss_weight=0.1),
        dict(loss_type="sft", label_smoothing=0.1),
    ],
    ids=str,
)
def test_meaningless_settings_are_refused(changes):
    with pytest.raises(UserError, match="objective."):
        objective(**changes)


def test_a_large_alpha_is_warned_of():
    assert objective(alpha=1.0).warning is None
    assert "multiplied by 0.25 to 1.75" in objective(alpha=1.5).warning
