"""Preference losses with token-level reward regularization: tensors in, loss and metrics out.

Notation (T-REG, Zhou et al., ACL 2025, arXiv 2412.02685): y_w chosen, y_l rejected response; ``logps`` are
log pi_theta(y_t), ``ref_logps`` log pi_ref(y_t), ``token_rewards`` r_t in (-0.5, 0.5); sg is stop-gradient.

Inputs are flat, one float per response token, in the order chosen 0, rejected 0, chosen 1, rejected 1, ...;
``lengths`` gives the tokens of each response. Padded and packed micro-batches look the same here, and no value depends
on how many pairs share a micro-batch: every returned value is a sum over pairs. All reductions run in fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from treg_megatron.config.schema import ObjectiveSection
from treg_megatron.errors import UserError

LARGEST_ALPHA = 2.0  # beyond it a token's gradient can change sign, since |r_t| <= 0.5
_UNUSUAL_ALPHA = 1.0  # the paper searched up to 0.5


@dataclass
class Objective(ObjectiveSection):
    """The loss to minimise: the recipe's section ``objective``, which explains the fields, with its values checked.

    Raises:
        UserError: a value is out of range, or a combination of values has no meaning.
    """

    @classmethod
    def of(cls, section: ObjectiveSection) -> "Objective":
        """The objective that a recipe's section describes.

        Raises:
            UserError: as the constructor.
        """
        return cls(**vars(section))

    def __post_init__(self):
        refuse = _refuse_if
        refuse(self.beta <= 0, f"objective.beta is {self.beta}: it must be positive")
        refuse(self.gamma < 0, f"objective.gamma is {self.gamma}: a target margin is not negative")
        refuse(
            not 0 <= self.label_smoothing < 0.5,
            f"objective.label_smoothing is {self.label_smoothing}: the fraction of flipped pairs must lie in [0, 0.5)",
        )
        refuse(
            not 0 <= self.alpha <= LARGEST_ALPHA,
            f"objective.alpha is {self.alpha}: outside [0, 2] a token's gradient changes sign",
        )
        refuse(
            self.sft_loss_weight < 0, f"objective.sft_loss_weight is {self.sft_loss_weight}: it must not be negative"
        )
        refuse(
            self.loss_type == "sft" and (self.alpha > 0 or self.label_smoothing > 0 or self.sft_loss_weight > 0),
            "objective.loss_type=sft is the likelihood of the chosen responses and nothing else: set alpha, "
            "label_smoothing and sft_loss_weight to 0",
        )
        refuse(
            self.gamma > 0 and self.loss_type != "simpo",
            f"objective.gamma belongs to simpo; {self.loss_type} has no target margin: set it to 0",
        )
        refuse(
            self.label_smoothing > 0 and self.loss_type == "ipo",
            "objective.label_smoothing has no meaning for ipo, whose loss is a regression: set it to 0",
        )
        refuse(
            self.alpha > 0 and self.loss_type == "ipo",
            "objective.alpha: the regulariser's weight is the gradient weight of a sigmoid loss, and ipo has none; "
            "use dpo, dpo_norm or simpo, or set alpha to 0",
        )
        refuse(
            self.alpha > 0 and self.token_rewards == "none",
            "objective.alpha is positive but objective.token_rewards is none: set one of the two",
        )
        refuse(
            self.token_rewards == "implicit" and not self.needs_reference,
            f"objective.token_rewards: implicit is the log-ratio to a reference model, and {self.loss_type} has none",
        )

    @property
    def needs_reference(self) -> bool:
        """Whether the reference model's log-probs enter the loss."""
        return self.loss_type not in ("simpo", "sft")

    @property
    def is_length_normalized(self) -> bool:
        """Whether a response's reward is a mean over its tokens: beta / |y| takes the place of DPO's beta."""
        return self.loss_type in ("simpo", "dpo_norm")

    @property
    def warning(self) -> str | None:
        """A warning about settings that are valid but rarely intended, or None."""
        if self.alpha <= _UNUSUAL_ALPHA:
            return None
        return (
            f"objective.alpha={self.alpha:g} is large: a token's gradient is multiplied by {1 - self.alpha / 2:g} to "
            f"{1 + self.alpha / 2:g}; the paper searched 0.1 to 0.5"
        )

    @property
    def first_preference_loss(self) -> float | None:
        """The preference loss of a policy that equals its reference, or None if it depends on the data."""
        if self.loss_type in ("dpo", "dpo_norm"):
            return 0.6931471805599453  # -log sigma(0), whatever the label smoothing
        if self.loss_type == "ipo":
            return (1 / (2 * self.beta)) ** 2
        return None


class Responses:
    """The mapping of flat response tokens to responses.

    Args:
        lengths: number of this rank's tokens of each response: chosen 0, rejected 0, chosen 1, ...
        context_group: the context-parallel group whose ranks hold the other tokens of the same responses, or None.
    """

    def __init__(self, lengths: list[int], context_group: dist.ProcessGroup | None = None):
        self.lengths, self.context_group = lengths, context_group
        self.tokens = torch.tensor(lengths, dtype=torch.float32)  # of whole responses
        if context_group is not None:
            dist.all_reduce(self.tokens, group=context_group)

    def sums(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens] -> ([pairs] of the chosen, [pairs] of the rejected), over whole responses.

        Each response is summed separately, so that a pair's loss has the same bits in any micro-batch.
        """
        if not self.lengths:
            return values.sum()[None][:0], values.sum()[None][:0]
        sums = torch.stack([response.sum() for response in values.split(self.lengths)])
        if self.context_group is not None:
            sums = _SumOverContext.apply(sums, self.context_group)
        return sums[0::2], sums[1::2]

    def spread(self, per_response: Tensor, like: Tensor) -> Tensor:
        """[2 * pairs] -> [tokens]: each token gets the value of its response."""
        return torch.repeat_interleave(per_response, torch.tensor(self.lengths, dtype=torch.int64)).to(like.device)


class _SumOverContext(torch.autograd.Function):
    """An all-reduce whose backward is the identity.

    Every context-parallel rank computes the same loss from the sum, and Megatron adds the gradients of the ranks, each
    of which covers only its own tokens.
    """

    @staticmethod
    def forward(ctx, values, group):
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def preference_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    token_rewards: Tensor | None,
    lengths: list[int],
    objective: Objective,
    context_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss of a micro-batch of pairs, and the sums from which its metrics are averaged.

    Args:
        logps: [tokens] fp32, log pi_theta of each response token in nats, with gradient.
        ref_logps: [tokens] fp32, the same of the reference model; may be None for a reference-free objective.
        token_rewards: [tokens] fp32, r_t; may be None if the objective does not read them.
        lengths: number of tokens of each response, 2 * pairs entries: chosen, rejected, chosen, ...
        objective: the loss and its hyper-parameters.
        context_group: the context-parallel group that responses are split over; the inputs are then this rank's part.

    Returns:
        loss: [] fp32, sum over the pairs. T-REG, section 3: L_pref + alpha * w * (L_reg(y_w) + L_reg(y_l)).
        sums: metric name -> [] fp32 without gradient, a sum over pairs (or over tokens for the names in ``COUNTS``).
    """
    responses = Responses(lengths, context_group)
    logps = logps.float()
    ref_logps = torch.zeros_like(logps) if ref_logps is None else ref_logps.float()
    per_token = objective.beta * torch.ones_like(logps)
    if objective.is_length_normalized:
        per_token = objective.beta * responses.spread(1.0 / responses.tokens, logps)

    log_ratio = logps - ref_logps if objective.needs_reference else logps
    chosen, rejected = responses.sums(per_token * log_ratio)
    margin = chosen - rejected
    preference = _PREFERENCE[objective.loss_type](margin, log_ratio, responses, objective)
    loss = preference

    weight = torch.ones_like(margin)
    if objective.weight == "dynamic":
        weight = torch.sigmoid(-(margin - objective.gamma if objective.weight_margin else margin)).detach()
    rewards = _token_rewards(log_ratio, token_rewards, objective)
    regularization = torch.zeros_like(margin)
    if rewards is not None:
        chosen_reg, rejected_reg = responses.sums(-per_token * rewards * logps)
        regularization = weight * (chosen_reg + rejected_reg)
        if objective.alpha > 0:
            loss = loss + objective.alpha * regularization
    chosen_logps, rejected_logps = responses.sums(logps)
    if objective.sft_loss_weight > 0:
        loss = loss - objective.sft_loss_weight * chosen_logps

    sums = {
        "pairs": torch.ones_like(margin),
        "loss": loss,
        "loss/preference": preference,
        "loss/regularization": regularization,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).float(),
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
        "treg/weight": weight,
        **_token_reward_sums(rewards, responses, objective.alpha, margin),
    }
    return loss.sum(), {name: value.detach().sum() for name, value in sums.items()}


#: metric name -> the count that its sum is divided by; all other metrics are divided by "pairs"
COUNTS = {
    "treg/token_reward_chosen": "tokens/chosen",
    "treg/token_reward_rejected": "tokens/rejected",
    "treg/factor_outside_quarter": "tokens",
}


def means(sums: dict[str, float]) -> dict[str, float]:
    """Metrics from their sums over the global batch, each divided by its count (see ``COUNTS``)."""
    counts = {"pairs", *COUNTS.values()}
    return {
        name: value / max(sums[COUNTS.get(name, "pairs")], 1.0) for name, value in sums.items() if name not in counts
    }


def _dpo(margin: Tensor, log_ratio: Tensor, responses: Responses, o: Objective) -> Tensor:
    """-log sigma(margin) (DPO, arXiv 2305.18290, eq. 7); flipped with probability eps in cDPO (its section 3 note).

    For dpo_norm the margin is that of beta/|y| log(pi/pi_ref) (length-normalized DPO of Tulu 3, arXiv 2411.15124).
    """
    return -(1 - o.label_smoothing) * F.logsigmoid(margin) - o.label_smoothing * F.logsigmoid(-margin)


def _simpo(margin: Tensor, log_ratio: Tensor, responses: Responses, o: Objective) -> Tensor:
    """-log sigma(beta/|y_w| log pi(y_w) - beta/|y_l| log pi(y_l) - gamma) (SimPO, arXiv 2405.14734, eq. 6)."""
    return _dpo(margin - o.gamma, log_ratio, responses, o)


def _ipo(margin: Tensor, log_ratio: Tensor, responses: Responses, o: Objective) -> Tensor:
    """(h - 1/(2 beta))^2 (IPO, arXiv 2310.12036, eq. 17), where h is the difference of the log-ratios.

    Log-ratios are averaged over the tokens of a response, as in the authors' follow-up and in TRL.
    """
    chosen, rejected = responses.sums(log_ratio)
    tokens = responses.tokens.to(margin.device)
    return (chosen / tokens[0::2] - rejected / tokens[1::2] - 1 / (2 * o.beta)) ** 2


def _sft(margin: Tensor, log_ratio: Tensor, responses: Responses, o: Objective) -> Tensor:
    """-log pi(y_w): maximum likelihood of the chosen responses; the rejected ones only enter the metrics."""
    return -responses.sums(log_ratio)[0]


_PREFERENCE: dict[str, Callable[..., Tensor]] = {
    "dpo": _dpo,
    "dpo_norm": _dpo,
    "simpo": _simpo,
    "ipo": _ipo,
    "sft": _sft,
}


def _token_rewards(log_ratio: Tensor, token_rewards: Tensor | None, objective: Objective) -> Tensor | None:
    """r_t of each token, [tokens] fp32, or None.

    Implicit rewards are sg(sigma(log-ratio) - 0.5): DPO's own token reward, squashed as T-REG squashes the contrastive
    one, so that alpha means the same for both.
    """
    if objective.token_rewards == "implicit":
        return torch.sigmoid(log_ratio).detach() - 0.5
    if objective.token_rewards == "contrastive" and token_rewards is not None:
        return token_rewards.float()
    return None


def _token_reward_sums(rewards: Tensor | None, responses: Responses, alpha: float, like: Tensor) -> dict[str, Tensor]:
    tokens = responses.tokens.to(like.device)
    counts = {"tokens/chosen": tokens[0::2], "tokens/rejected": tokens[1::2], "tokens": tokens}
    if rewards is None:
        return counts
    chosen, rejected = responses.sums(rewards)
    outside = responses.sums((alpha * rewards.abs() > 0.25).float())  # |factor - 1| > 0.25
    return {
        **counts,
        "treg/token_reward_chosen": chosen,
        "treg/token_reward_rejected": rejected,
        "treg/factor_outside_quarter": torch.cat(outside),
    }


def _refuse_if(condition: bool, reason: str) -> None:
    if condition:
        raise UserError(reason)
