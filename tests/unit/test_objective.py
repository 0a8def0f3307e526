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
        for sign, n in zip((1, -1), LENGTHS[2 * pair : 2 * pair + 2]):
            lp, ref, r = (x[at : at + n].double().tolist() for x in (logps, ref_logps, rewards))
            at += n
            ratio = lp if o.loss_type in ("simpo", "sft") else [a - b for a, b in zip(lp, ref)]
            if o.token_rewards == "implicit":
                r = [sigmoid(x) - 0.5 for x in ratio]
            weights, counted = token_weights(o, lp, r, sign) if o.token_values == "margin" else ([1.0] * n, n)
            beta = o.beta / max(counted, 1) if o.loss_type in ("simpo", "dpo_norm") else o.beta
            sides.append(
                {
                    "reward": beta * sum(w * x for w, x in zip(weights, ratio)),
                    "reg": -beta * sum(a * b for a, b in zip(r, lp)),
                    "mean_ratio": sum(ratio) / n,
                    "logp": sum(lp),
                }
            )
        chosen, rejected = sides
        margin = chosen["reward"] - rejected["reward"]
        loss = preference(o, chosen, rejected)
        if o.token_values == "regularizer":
            weight = 1.0 if o.weight == "static" else sigmoid((o.gamma if o.weight_margin else 0.0) - margin)
            loss += o.alpha * weight * (chosen["reg"] + rejected["reg"])
        total += loss - o.sft_loss_weight * chosen["logp"]
    return total


def token_weights(o: Objective, lp: list[float], r: list[float], sign: int) -> tuple[list[float], int]:
    """The weight of each token, and how many of them a mean is taken over."""
    n = len(lp)
    if o.token_weight == "linear":
        return [1 + sign * o.alpha * x for x in r], n
    if o.token_weight == "importance":
        least, greatest = o.token_weight_range
        log_ratio = [math.log((0.5 + x) / (0.5 - x)) for x in r]  # of the better to the worse prompt
        return [min(max(math.exp(sign * o.alpha * x), least), greatest) for x in log_ratio], n
    if o.token_weight == "decay":
        return [o.token_decay**t for t in range(n)], n
    if o.token_weight == "confident":
        counts = [math.exp(x) < sum(map(math.exp, lp)) / n for x in lp]
    else:
        counted = sorted(range(n), key=lambda t: -sign * r[t])[: math.ceil(o.token_share * n)]
        counts = [t in counted for t in range(n)]
    return [float(x) for x in counts], sum(counts)


def preference(o: Objective, chosen: dict, rejected: dict) -> float:
    c, r, eps = chosen["reward"], rejected["reward"], o.label_smoothing
    margin = c - r - o.gamma
    p, q = sigmoid(margin), sigmoid(-margin)
    return {
        "dpo": lambda: -(1 - eps) * math.log(p) - eps * math.log(q),
        "ipo": lambda: (chosen["mean_ratio"] - rejected["mean_ratio"] - 1 / (2 * o.beta)) ** 2,
        "sft": lambda: -chosen["logp"],
        "robust": lambda: (eps * math.log(q) - (1 - eps) * math.log(p)) / (1 - 2 * eps),
        "hinge": lambda: max(0.0, 1 - margin),
        "exo": lambda: p * math.log(p / (1 - eps)) + q * math.log(q / eps),
        "nca": lambda: -math.log(sigmoid(c)) - math.log(sigmoid(-c)) / 2 - math.log(sigmoid(-r)) / 2,
        "apo_zero": lambda: 1 - sigmoid(c) + sigmoid(r),
        "apo_down": lambda: sigmoid(c) + 1 - p,
    }[{"dpo_norm": "dpo", "simpo": "dpo"}.get(o.loss_type, o.loss_type)]()


def responses_of(rewards) -> Responses:
    """Whole responses, with the order of their tokens."""
    ranks = [(-part).argsort(stable=True).argsort(stable=True) for part in rewards.split(LENGTHS)]
    return dataclasses.replace(
        Responses.whole(LENGTHS), positions=torch.cat([torch.arange(n) for n in LENGTHS]), ranks=torch.cat(ranks)
    )


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_loss_is_the_formula(tokens, changes):
    o = objective(**changes)
    loss, _ = preference_loss(*tokens, responses_of(tokens[2]), o)
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


def test_gradient_identity_inside_the_margin(tokens):
    """dL/dlog pi(y_w,t) = -beta sigma(-m) w_t, dL/dlog pi(y_l,t) = beta sigma(-m) w_t, with m the weighted margin."""
    logps, ref_logps, rewards = tokens
    logps = logps.requires_grad_()
    o = objective(token_values="margin", alpha=0.5)
    loss, sums = preference_loss(logps, ref_logps, rewards, Responses.whole(LENGTHS), o)
    loss.backward()
    at = 0
    for pair in range(len(LENGTHS) // 2):
        spans, margin = [], 0.0
        for sign, n in zip((1, -1), LENGTHS[2 * pair : 2 * pair + 2]):
            span = slice(at, at + n)
            weights = 1 + sign * 0.5 * rewards[span].double()
            margin += sign * o.beta * (weights * (logps[span] - ref_logps[span]).detach().double()).sum().item()
            spans.append((span, -sign * weights))
            at += n
        for span, weights in spans:
            expected = (o.beta * sigmoid(-margin) * weights).float()
            torch.testing.assert_close(logps.grad[span], expected, rtol=1e-6, atol=0)
    assert sums["loss/regularization"] == 0 and sums["loss"] == sums["loss/preference"] == loss


def test_hand_computed_weights():
    """Three tokens against two, log-ratios 1: the margin is the sum of the chosen weights less the rejected ones."""
    rewards = torch.tensor([0.4, -0.2, 0.0, 0.3, -0.1])
    responses = dataclasses.replace(
        Responses.whole([3, 2]), positions=torch.tensor([0, 1, 2, 0, 1]), ranks=torch.tensor([0, 2, 1, 0, 1])
    )
    logps = torch.log(torch.tensor([0.9, 0.2, 0.1, 0.5, 0.5]))
    for rule, expected in (
        (dict(token_weight="linear", alpha=0.5), (1.2 + 0.9 + 1.0) - (0.85 + 1.05)),
        (dict(token_weight="importance", alpha=1.0), (1.3 + 0.7 + 1.0) - (0.7 + 1.3)),  # 9, 3/7, 1 and 1/4, 3/2 clipped
        (dict(token_weight="select", token_share=0.5), 2 - 1),
        (dict(token_weight="decay", token_decay=0.5), (1 + 0.5 + 0.25) - (1 + 0.5)),
        (dict(token_weight="confident"), 2 - 0),
    ):
        o = objective(token_values="margin", beta=1.0, **rule)
        _, sums = preference_loss(logps, logps - 1, rewards, responses, o)
        assert sums["rewards/margins"].item() == pytest.approx(expected, abs=1e-6), rule


@pytest.mark.parametrize("nothing", [dict(alpha=0.0), dict(alpha=0.7), dict(alpha=0.0, token_values="margin")])
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
    responses = responses_of(tokens[2])
    on_device = ("segments", "places", "tokens", "positions", "ranks")
    on_meta = {name: getattr(responses, name).to("meta") for name in on_device}
    loss, sums = preference_loss(*meta, dataclasses.replace(responses, **on_meta), objective(**changes))
    loss.backward()
    assert all(x.is_meta for x in (loss, meta[0].grad, *sums.values()))


@pytest.mark.parametrize("changes", [*VARIANTS, dict(label_smoothing=0.2)], ids=str)
def test_a_policy_that_is_its_reference_has_the_known_loss(tokens, changes):
    logps, _, rewards = tokens
    o = objective(**changes)
    assert (o.first_preference_loss is None) == (o.loss_type in ("simpo", "sft"))
    if o.first_preference_loss is not None:
        _, sums = preference_loss(logps, logps, rewards, responses_of(rewards), o)
        assert means({k: v.item() for k, v in sums.items()})["loss/preference"] == pytest.approx(
            o.first_preference_loss, abs=1e-6
        )


@pytest.mark.parametrize(
    "changes", [dict(alpha=0.5, sft_loss_weight=0.3), dict(token_values="margin", alpha=0.5)], ids=str
)
def test_a_weight_is_a_factor_of_the_whole_loss_of_a_pair(tokens, changes):
    """Losses add up to the weighted sum of each pair's own; every other metric stays as it is."""
    o, weights, ends = objective(**changes), torch.tensor([2.0, 0.0, 0.25]), (0, 8, 17, 19)
    loss, sums = preference_loss(*tokens, Responses.whole(LENGTHS), o, weights)
    alone = [
        preference_loss(*(x[ends[i] : ends[i + 1]] for x in tokens), Responses.whole(LENGTHS[2 * i : 2 * i + 2]), o)[1]
        for i in range(3)
    ]
    for name, value in sums.items():
        factors = weights.tolist() if name.startswith("loss") else [1.0] * 3
        expected = [each.get(name, weights[i]).item() for i, each in enumerate(alone)]
        assert value.item() == pytest.approx(sum(f * x for f, x in zip(factors, expected)), rel=1e-6), name
    assert loss == sums["loss"] and means({k: v.item() for k, v in sums.items()})["treg/pair_weight"] == 0.75


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
        dict(alpha=0.5, token_rewards="implicit", values="oracle"),
        dict(loss_type="simpo", token_rewards="implicit"),
        dict(loss_type="sft", alpha=0.5),
        dict(loss_type="sft", sft_loss_weight=0.1),
        dict(loss_type="sft", label_smoothing=0.1),
        dict(loss_type="hinge", label_smoothing=0.1),
        dict(loss_type="exo"),
        dict(loss_type="robust", alpha=0.5),
        dict(token_values="margin", loss_type="ipo"),
        dict(token_values="margin", loss_type="sft"),
        dict(token_values="margin", token_weight="decay", alpha=0.5),
        dict(token_values="margin", token_weight="confident", alpha=0.5),
        dict(token_values="margin", token_rewards="none"),
        dict(token_values="margin", token_weight="select", token_rewards="implicit"),
        dict(token_values="margin", token_weight="importance", token_weight_range=[1.1, 1.3]),
        dict(token_values="margin", token_weight="importance", token_weight_range=[0.7]),
        dict(token_values="margin", token_weight="select", token_share=0.0),
        dict(token_values="margin", token_weight="decay", token_decay=1.1),
    ],
    ids=str,
)
def test_meaningless_settings_are_refused(changes):
    with pytest.raises(UserError, match="objective."):
        objective(**changes)


def test_a_large_alpha_is_warned_of():
    assert objective(alpha=1.0).warning is None
    assert "multiplied by 0.25 to 1.75" in objective(alpha=1.5).warning
