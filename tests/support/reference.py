"""Plain PyTorch and Hugging Face training with the formula of docs/METHOD.md, which the parallel trainer must match.

Nothing here is shared with the package: one sequence at a time, full logits, torch's AdamW.
"""

import math

import torch
import torch.nn.functional as F

ANOTHERS_TURN = -9.0  # in place of the reward of a token that the assistant does not write


def response_logps(model, tokens, rewards) -> torch.Tensor:
    """Log-probs of the response tokens of one sequence that the assistant writes."""
    ids = torch.tensor(tokens.tolist())
    logps = model(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
    first = len(ids) - len(rewards)
    return torch.stack(
        [logps[first + t - 1, ids[first + t]] for t, reward in enumerate(rewards) if reward != ANOTHERS_TURN]
    )


def pair_logps(model, pair) -> list[torch.Tensor]:
    """Log-probs of the chosen and the rejected response of one pair (a treg_megatron.data.aligned.PairRecord)."""
    return [
        response_logps(model, tokens, rewards)
        for tokens, rewards in (
            (pair.chosen_tokens, pair.chosen_token_rewards),
            (pair.rejected_tokens, pair.rejected_token_rewards),
        )
    ]


def mean_margin(model, pairs, beta: float) -> float:
    """beta times the mean of log-prob over reference of the chosen minus the rejected response, a pair's margin."""
    margins = []
    with torch.no_grad():
        for pair in pairs:
            chosen, rejected = pair_logps(model, pair)
            chosen_ref, rejected_ref = torch.tensor(pair.chosen_ref_logprobs), torch.tensor(pair.rejected_ref_logprobs)
            margins.append(beta * ((chosen - chosen_ref).sum() - (rejected - rejected_ref).sum()))
    return torch.stack(margins).mean().item()


def pair_loss(
    logps: list[torch.Tensor], pair, *, pair_weights: bool = False, values: None = None, **objective
) -> torch.Tensor:
    """The loss of one pair, in the precision of its log-probs, times the pair's weight if it counts."""
    return (pair.pair_weight if pair_weights else 1) * unweighted_loss(logps, pair, **objective)


def unweighted_loss(
    logps: list[torch.Tensor],
    pair,
    *,
    beta: float,
    alpha: float,
    loss_type: str = "dpo",
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    weight: str = "dynamic",
    weight_margin: bool = True,
    token_rewards: str = "contrastive",
    sft_loss_weight: float = 0.0,
    token_values: str = "regularizer",
    token_weight: str = "linear",
    token_weight_range: list[float] = (0.7, 1.3),
    token_share: float = 0.3,
    token_decay: float = 0.98,
) -> torch.Tensor:
    """The loss of one pair, whatever its weight."""
    rewards = (pair.chosen_token_rewards, pair.rejected_token_rewards)
    written = [side != ANOTHERS_TURN for side in rewards]
    refs, rewards = (
        [torch.tensor(x[mask]).to(logps[0].dtype) for x, mask in zip(both, written)]
        for both in ((pair.chosen_ref_logprobs, pair.rejected_ref_logprobs), rewards)
    )
    if loss_type == "sft":
        return -logps[0].sum()
    ratios = [lp - ref for lp, ref in zip(logps, refs)]
    if loss_type == "ipo":
        return (ratios[0].mean() - ratios[1].mean() - 1 / (2 * beta)) ** 2 - sft_loss_weight * logps[0].sum()
    if token_rewards == "implicit":
        rewards = [torch.sigmoid(ratio.detach()) - 0.5 for ratio in ratios]
    if token_values == "margin" or loss_type not in ("dpo", "dpo_norm", "simpo"):
        sides = []
        for sign, lp, ratio, r in zip((1, -1), logps, ratios, rewards):
            weights = torch.ones_like(lp)
            if token_values == "margin":
                weights = {
                    "linear": lambda: 1 + sign * alpha * r,
                    "importance": lambda: torch.exp(sign * alpha * torch.log((0.5 + r) / (0.5 - r))).clamp(
                        *token_weight_range
                    ),
                    "select": lambda: best(r, math.ceil(token_share * len(r)), sign),
                    "decay": lambda: torch.tensor([token_decay**t for t in range(len(lp))]).to(lp),
                    "confident": lambda: (lp.exp() < lp.exp().mean()).to(lp).detach(),
                }[token_weight]()
            counted = weights.sum() if token_weight in ("select", "confident") else len(lp)
            per_token = beta / max(counted, 1) if loss_type in ("simpo", "dpo_norm") else beta
            sides.append((per_token * weights * (lp if loss_type == "simpo" else ratio)).sum())
        return sequence_loss(loss_type, *sides, gamma, label_smoothing) - sft_loss_weight * logps[0].sum()
    if loss_type == "simpo":
        margin = beta * (logps[0].mean() - logps[1].mean())
        regularizer = -beta * sum((r * lp).mean() for r, lp in zip(rewards, logps))
    elif loss_type == "dpo_norm":
        margin = beta * (ratios[0].mean() - ratios[1].mean())
        regularizer = -beta * sum((r * lp).mean() for r, lp in zip(rewards, logps))
    else:
        margin = beta * (ratios[0].sum() - ratios[1].sum())
        regularizer = -beta * sum((r * lp).sum() for r, lp in zip(rewards, logps))
    target = margin - gamma
    dynamic = torch.sigmoid(-(target if weight_margin else margin)).detach()
    return (
        -(1 - label_smoothing) * F.logsigmoid(target)
        - label_smoothing * F.logsigmoid(-target)
        + alpha * (dynamic if weight == "dynamic" else 1.0) * regularizer
        - sft_loss_weight * logps[0].sum()
    )


def best(rewards: torch.Tensor, number: int, sign: int) -> torch.Tensor:
    """1 for the first of the tokens by falling reward, or the last with ``sign`` -1, and 0 for the others."""
    order = sorted(range(len(rewards)), key=lambda t: -rewards[t].item())
    counted = order[:number] if sign == 1 else order[-number:]
    return torch.tensor([float(t in counted) for t in range(len(rewards))]).to(rewards)


def sequence_loss(loss_type: str, chosen, rejected, gamma: float, eps: float) -> torch.Tensor:
    """The preference loss of a pair's rewards."""
    margin = chosen - rejected - gamma
    positive, negative = F.logsigmoid(margin), F.logsigmoid(-margin)
    p, q = positive.exp(), negative.exp()
    if loss_type == "exo":
        return p * (positive - math.log(1 - eps)) + q * (negative - math.log(eps))
    return {
        "robust": -((1 - eps) * positive - eps * negative) / (1 - 2 * eps),
        "hinge": (1 - margin).clamp(min=0),
        "nca": -(chosen.sigmoid().log() + ((1 - chosen.sigmoid()).log() + (1 - rejected.sigmoid()).log()) / 2),
        "apo_zero": 1 - chosen.sigmoid() + rejected.sigmoid(),
        "apo_down": chosen.sigmoid() + 1 - p,
    }.get(loss_type, -(1 - eps) * positive - eps * negative)


def learning_rate(step: int, steps: int, peak: float, lowest: float, warmup: int) -> float:
    """Linear warm-up over ``warmup`` steps, then cosine; ``step`` counts from 0."""
    if warmup > 0 and step <= warmup:
        return peak * (step + 1) / (warmup + 1)
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(
    model,
    batches: list[list],
    *,
    beta: float,
    alpha: float,
    lr: float,
    warmup: int,
    clip: float,
    betas: tuple[float, float],
    eps: float,
    min_lr: float = 0.0,
) -> tuple[list[float], list[float]]:
    """Take one optimizer step per batch of pairs; return the losses and the gradient norms before clipping."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, eps=eps, weight_decay=0.0)
    losses, norms = [], []
    for step, pairs in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), lr, min_lr, warmup)
        optimizer.zero_grad()
        loss = sum(pair_loss(pair_logps(model, pair), pair, beta=beta, alpha=alpha) for pair in pairs) / len(pairs)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms
