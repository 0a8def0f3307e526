"""Plain PyTorch and Hugging Face training with the formula of docs/METHOD.md: what the parallel trainer must equal.

Nothing here is shared with the package: one sequence at a time, whole logits, torch's AdamW.
"""

import math

import torch
import torch.nn.functional as F


def response_logps(model, tokens, response_length: int) -> torch.Tensor:
    """[response_length] log-probs of the last ``response_length`` tokens of one sequence."""
    ids = torch.tensor(tokens.tolist())
    logps = model(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
    return torch.stack([logps[t - 1, ids[t]] for t in range(len(ids) - response_length, len(ids))])


def pair_loss(model, pair, beta: float, alpha: float, capture: list | None = None) -> torch.Tensor:
    """DPO-REG's loss of one pair (a treg_megatron.streams.PairRecord)."""
    logps = [response_logps(model, tokens, len(rewards)) for tokens, rewards in
             ((pair.chosen_tokens, pair.chosen_token_rewards), (pair.rejected_tokens, pair.rejected_token_rewards))]
    refs = [torch.tensor(x).to(logps[0].dtype) for x in (pair.chosen_ref_logprobs, pair.rejected_ref_logprobs)]
    rewards = [torch.tensor(x).to(logps[0].dtype) for x in (pair.chosen_token_rewards, pair.rejected_token_rewards)]
    r_w, r_l = (beta * (lp - ref).sum() for lp, ref in zip(logps, refs))
    weight = torch.sigmoid(r_l - r_w).detach()
    regularizers = [-(beta * r * lp).sum() for r, lp in zip(rewards, logps)]
    if capture is not None:
        for lp in logps:
            lp.retain_grad()
            capture.append(lp)
    return -F.logsigmoid(r_w - r_l) + alpha * weight * (regularizers[0] + regularizers[1])


def learning_rate(step: int, steps: int, peak: float, lowest: float, warmup: int) -> float:
    """Linear warm-up over ``warmup`` steps, then cosine; ``step`` counts from 0."""
    if warmup > 0 and step <= warmup:
        return peak * (step + 1) / (warmup + 1)
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def train(model, batches: list[list], *, beta: float, alpha: float, lr: float, warmup: int, clip: float,
          betas: tuple[float, float], eps: float, min_lr: float = 0.0) -> tuple[list[float], list[float]]:
    """One optimizer step for each batch of pairs; the losses and the gradient norms before clipping."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, eps=eps, weight_decay=0.0)
    losses, norms = [], []
    for step, pairs in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches), lr, min_lr, warmup)
        optimizer.zero_grad()
        loss = sum(pair_loss(model, pair, beta, alpha) for pair in pairs) / len(pairs)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms
