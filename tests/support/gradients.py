"""Full gradients of the model in training, assembled from all ranks like a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class Finished(Exception):
    """Every objective has taken its step."""


def steps_on_this_rank(recipe: Path, overrides: list[str], objectives: list[dict]) -> list[dict[str, Any]]:
    """Train one step per objective, always with the weights as loaded.

    Only an objective with ``pair_weights`` sees the weights of the pairs.

    Returns on rank 0, for each objective: the loss, and the gradient of every parameter by checkpoint key.
    """
    from treg_megatron.config.recipe import load_recipe
    from treg_megatron.distributed.device_labels import unchecked
    from treg_megatron.models import policy as model
    from treg_megatron.objective import Objective
    from treg_megatron.train import train
    from treg_megatron.training import strategy

    weighted = [o.get("pair_weights", False) for o in objectives]
    objectives = [Objective(**{name: value for name, value in o.items() if name != "pair_weights"}) for o in objectives]
    steps: list[dict[str, Any]] = []
    loss_of, optimizer_step = model.preference_loss, strategy.PolicyStrategy.optimizer_step

    def loss_of_this_step(logps, ref_logps, token_rewards, responses, objective, pair_weights):
        lengths, group, step = responses.lengths, responses.context_group, len(steps)
        if weighted[step]:
            return loss_of(logps, ref_logps, token_rewards, responses, objectives[step], pair_weights)
        with unchecked():
            assert_gradient_identity_on(logps, ref_logps, token_rewards, lengths, objectives[step], group)
        return loss_of(logps, ref_logps, token_rewards, responses, objectives[step])

    def capture(self, optimizer, closure: Callable, *args, **kwargs):
        def then_gather():
            loss = closure()
            steps.append({"loss": loss.item(), "gradients": full_gradients(self.megatron_parallel)})
            if len(steps) == len(objectives):
                raise Finished
            return loss

        return optimizer_step(self, optimizer, then_gather, *args, **kwargs)

    model.preference_loss, strategy.PolicyStrategy.optimizer_step = loss_of_this_step, capture
    try:
        train(
            load_recipe(
                recipe,
                [
                    *overrides,
                    "optimizer.lr=0",
                    "train.first_loss_tolerance=1e9",
                    "data.validation=null",
                    "objective.alpha=0",  # an objective that makes the micro-batches bring the order of the tokens
                    "objective.token_values=margin",
                    "objective.token_weight=decay",
                    f"data.epochs={len(objectives)}",
                ],
            )
        )
    except Finished:
        return steps if dist.get_rank() == 0 else []
    raise AssertionError("training ended early")


def assert_gradient_identity_on(logps, ref_logps, rewards, lengths, o, group) -> None:
    """dL/dlog pi = -beta w (1 + alpha r_t) on the chosen, +beta w (1 - alpha r_t) on the rejected response, to 1e-6.

    Inside the margin the same factors also weigh the log-ratios of which w is made.
    """
    from treg_megatron.distributed.device_labels import unchecked

    if (
        not lengths
        or o.alpha == 0
        or o.loss_type not in ("dpo", "dpo_norm", "simpo")
        or o.weight == "static"
        or o.label_smoothing
        or o.sft_loss_weight
        or o.token_rewards != "contrastive"
        or (o.gamma and not o.weight_margin)
        or (o.token_values == "margin" and o.token_weight != "linear")
    ):
        return
    full_lengths = torch.tensor(lengths, dtype=torch.float64)
    ratio = logps.detach().double() - (0 if o.loss_type == "simpo" else ref_logps.double())
    signs = [-1, 1] * (len(lengths) // 2)
    factors = torch.cat([1 - sign * o.alpha * r.double() for sign, r in zip(signs, rewards.split(lengths))])
    weighted = ratio * factors if o.token_values == "margin" else ratio
    sums = torch.stack([part.sum() for part in weighted.split(lengths)])
    sizes = torch.stack([part.abs().sum() for part in weighted.split(lengths)])
    for total in (full_lengths, sums, sizes) if group is not None else ():
        dist.all_reduce(total, group=group)
    per_token = torch.full_like(full_lengths, o.beta) if o.loss_type == "dpo" else o.beta / full_lengths
    reward = per_token * sums
    weight = torch.sigmoid(reward[1::2] - reward[0::2] + o.gamma)
    expected = torch.cat(
        [
            sign * beta * w * part
            for beta, w, sign, part in zip(per_token, weight.repeat_interleave(2), signs, factors.split(lengths))
        ]
    )

    # an error of the fp32 margin, at most half a unit in the last place of each sum, is w's relative error
    rounding = (per_token * sizes).max().item() * 2**-23 if o.token_values == "margin" else 0.0

    @unchecked()
    def check(grad):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-6 + rounding, atol=0)

    if logps.requires_grad:
        logps.register_hook(check)


def full_gradients(megatron_parallel) -> dict[str, torch.Tensor]:
    """All ranks' main gradients, placed into the full tensors; replicas must be identical bit for bit."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    weights = {}
    for chunk in megatron_parallel:
        for buffer in chunk.module.buffers + chunk.module.expert_parallel_buffers:
            for bucket in buffer.buckets:  # the distributed optimizer has reduced only its own shard
                shards = bucket.grad_data.view(dist.get_world_size(buffer.data_parallel_group), -1)
                dist.all_gather(
                    list(shards.unbind()),
                    shards[dist.get_rank(buffer.data_parallel_group)].clone(),
                    group=buffer.data_parallel_group,
                )
        for parameter in chunk.parameters():
            weights[parameter] = parameter.data
            parameter.data = parameter.main_grad
    described = megatron_parallel.sharded_state_dict()
    apply_factories(described)
    mine = [
        (t.key, t.global_shape, t.global_offset, t.data.detach().clone())
        for t in nested_values(described)
        if isinstance(t, ShardedTensor)
    ]
    for parameter, weight in weights.items():
        parameter.data = weight
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    full: dict[str, torch.Tensor] = {}
    for key, shape, offset, part in sum(everyone, []):
        full.setdefault(key, torch.full(shape, torch.nan))
        here = full[key][tuple(slice(o, None) for o in offset)]
        prepended = len(shape) - part.ndim
        here = here[tuple([0] * prepended + [slice(0, n) for n in part.shape])]
        assert here.isnan().all() or torch.equal(here, part), f"replicas of the gradient of {key} differ"
        here.copy_(part)
    return full
