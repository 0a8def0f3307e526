"""Preference losses with a value per token: tensors in, loss and metrics out.

T-REG regularises a preference loss by token rewards; its relatives weigh each token inside the margin by them.

Notation (T-REG, Zhou et al., ACL 2025, arXiv 2412.02685): y_w chosen, y_l rejected response; ``logps`` are
log pi_theta(y_t), ``ref_logps`` log pi_ref(y_t), ``token_rewards`` r_t in (-0.5, 0.5); sg is stop-gradient.

Inputs are flat, one float per response token, in the order chosen 0, rejected 0, chosen 1, rejected 1, ...;
:class:`Responses` says which token belongs to which. Padded and packed micro-batches look the same here, and no value
depends on how many pairs share a micro-batch: every returned value is a sum over pairs. All reductions run in fp32.
"""

import math
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
#: losses whose gradient with respect to the margin is -sigma(-margin), the dynamic weight of T-REG's regulariser
_SIGMOID_LOSSES = ("dpo", "dpo_norm", "simpo")

PAIR_WEIGHT = "treg/pair_weight"  # a metric of weighted pairs

Pair = tuple[Tensor, Tensor]  # [pairs] of the chosen, [pairs] of the rejected responses


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
            self.label_smoothing > 0 and self.loss_type not in (*_SIGMOID_LOSSES, "robust", "exo", "sft"),
            f"objective.label_smoothing has no meaning for {self.loss_type}, which knows no flipped pairs: set it to 0",
        )
        refuse(
            self.label_smoothing == 0 and self.loss_type == "exo",
            "objective.label_smoothing must be positive for exo, whose target distribution it smooths, such as 0.001",
        )
        if self.token_values == "margin":
            self._check_margin()
        else:
            refuse(
                self.alpha > 0 and self.loss_type not in _SIGMOID_LOSSES,
                "objective.alpha: the regulariser's weight is the gradient weight of a sigmoid loss, and "
                f"{self.loss_type} has none; use dpo, dpo_norm or simpo, or set alpha to 0",
            )
        refuse(
            self.alpha > 0 and self.token_rewards == "none",
            "objective.alpha is positive but objective.token_rewards is none: set one of the two",
        )
        refuse(
            bool(self.values) and self.token_rewards != "contrastive",
            f"objective.values={self.values} names token rewards of the dataset, but objective.token_rewards is "
            f"{self.token_rewards}: set it to contrastive, or values to null",
        )
        refuse(
            self.token_rewards == "implicit" and not self.needs_reference,
            f"objective.token_rewards: implicit is the log-ratio to a reference model, and {self.loss_type} has none",
        )

    def _check_margin(self) -> None:
        rule, limits = self.token_weight, list(self.token_weight_range)
        _refuse_if(
            self.loss_type in ("ipo", "sft"),
            f"objective.token_values: {self.loss_type} has no margin that tokens could be weighted in",
        )
        _refuse_if(
            rule in ("select", "decay", "confident") and self.alpha > 0,
            f"objective.alpha has no meaning for token_weight={rule}, whose weights have no strength: set it to 0",
        )
        _refuse_if(
            rule in ("linear", "importance", "select") and self.token_rewards == "none",
            f"objective.token_weight={rule} reads token rewards, but objective.token_rewards is none",
        )
        _refuse_if(
            rule == "select" and self.token_rewards == "implicit",
            "objective.token_weight=select ranks the rewards of the dataset: set objective.token_rewards=contrastive",
        )
        _refuse_if(
            len(limits) != 2 or not 0 < limits[0] <= 1 <= limits[1],
            f"objective.token_weight_range is {limits}: it must be two weights, 0 < least <= 1 <= greatest",
        )
        _refuse_if(not 0 < self.token_share <= 1, f"objective.token_share is {self.token_share}: it must lie in (0, 1]")
        _refuse_if(not 0 < self.token_decay <= 1, f"objective.token_decay is {self.token_decay}: it must lie in (0, 1]")

    @property
    def needs_token_order(self) -> bool:
        """Whether the loss reads a token's position, or its rank by reward, among the tokens of its response."""
        return self.token_values == "margin" and self.token_weight in ("select", "decay")

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
        if self.alpha <= _UNUSUAL_ALPHA or (self.token_values, self.token_weight) == ("margin", "importance"):
            return None
        return (
            f"objective.alpha={self.alpha:g} is large: a token's gradient is multiplied by {1 - self.alpha / 2:g} to "
            f"{1 + self.alpha / 2:g}; the paper searched 0.1 to 0.5"
        )

    @property
    def first_preference_loss(self) -> float | None:
        """The preference loss of a policy that equals its reference, or None if it depends on the data."""
        log_2 = 0.6931471805599453  # -log sigma(0)
        if self.loss_type == "ipo":
            return (1 / (2 * self.beta)) ** 2
        if self.loss_type == "exo":
            return -log_2 - 0.5 * math.log(self.label_smoothing * (1 - self.label_smoothing))
        return {
            "dpo": log_2,  # whatever the label smoothing
            "dpo_norm": log_2,
            "robust": log_2,
            "hinge": 1.0,
            "nca": 2 * log_2,
            "apo_zero": 1.0,
            "apo_down": 1.0,
        }.get(self.loss_type)


@dataclass(frozen=True)
class Responses:
    """The mapping of flat response tokens to responses, made with the micro-batch and moved to the device with it.

    Attributes:
        lengths: number of this rank's tokens of each response: chosen 0, rejected 0, chosen 1, ...
        segments: [tokens] int64, for each of this rank's tokens, the response that it belongs to.
        places: [tokens] int64, its number among this rank's tokens of that response.
        tokens: [2 * pairs] fp32, number of tokens of each whole response.
        context_group: the context-parallel group whose ranks hold the other tokens of the same responses, or None.
        positions: [tokens] int64, the index of each token in its whole response; None unless the objective reads it.
        ranks: [tokens] int64, the number of tokens of its whole response that come before it when they are sorted by
            falling reward, equal ones in order; None unless the objective reads it.
    """

    lengths: list[int]
    segments: Tensor
    places: Tensor
    tokens: Tensor
    context_group: dist.ProcessGroup | None = None
    positions: Tensor | None = None
    ranks: Tensor | None = None

    @classmethod
    def whole(cls, lengths: list[int]) -> "Responses":
        """Responses that are not split over ranks."""
        return cls(lengths, *segments_and_places(lengths), torch.tensor(lengths, dtype=torch.float32))

    def sums(self, *values: Tensor) -> list[Pair]:
        """[tokens] each -> ([pairs] of the chosen, [pairs] of the rejected) each, over whole responses."""
        return [(each[0::2], each[1::2]) for each in _SumOfEach.apply(torch.stack(values), self)]

    def total(self, values: Tensor) -> Tensor:
        """[tokens] -> [2 * pairs]: the sum over each whole response."""
        return _SumOfEach.apply(values[None], self)[0]

    def spread(self, per_response: Tensor) -> Tensor:
        """[..., 2 * pairs] -> [..., tokens]: each token gets the value of its response."""
        return per_response.index_select(-1, self.segments)


def segments_and_places(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """[sum of lengths] int64 each: 0, 0, 1, 1, 1, ... and 0, 1, 0, 1, 2, ... for the lengths 2, 3, ..."""
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    places = [torch.arange(length) for length in lengths]
    return segments, torch.cat(places) if places else segments


class _SumOfEach(torch.autograd.Function):
    """Sums over whole responses, [k, tokens] -> [k, 2 * pairs]; the order of a response's sum is its own, so that a
    pair's loss has the same bits in any micro-batch.

    The backward pass does not communicate: every context-parallel rank computes the same loss from the sums, and
    Megatron adds the gradients of the ranks, each of which covers only its own tokens.
    """

    @staticmethod
    def forward(ctx, values, responses):
        ctx.responses = responses
        sums = one_by_one(values, responses.lengths) if values.is_cpu else by_halves(values, responses)
        if responses.context_group is not None:
            dist.all_reduce(sums, group=responses.context_group)
        return sums

    @staticmethod
    def backward(ctx, grad):
        return ctx.responses.spread(grad), None


def one_by_one(values: Tensor, lengths: list[int]) -> Tensor:
    """[k, tokens] -> [k, responses] by one torch sum per response; on a GPU each would be a kernel of its own."""
    sums = [part.sum() for row in values for part in row.split(lengths)] if lengths else []
    return torch.stack(sums).view(len(values), -1) if sums else values.new_zeros(len(values), 0)


def by_halves(values: Tensor, responses: Responses) -> Tensor:
    """[k, tokens] -> [k, responses] in as many kernels whatever the number of responses.

    Each response becomes a row of zeros but for its tokens, and the second half of all rows is added to the first until
    one column is left. Twice the width adds zeros in one more step and nothing else: a response's sum does not depend
    on the longest one, as it would with torch's sum over rows.
    """
    width = 1 << max(max(responses.lengths, default=0) - 1, 0).bit_length()
    rows = values.new_zeros(len(values), len(responses.lengths), width)
    rows[:, responses.segments, responses.places] = values
    while rows.shape[-1] > 1:
        first, second = rows.chunk(2, dim=-1)
        rows = first + second
    return rows.squeeze(-1)


def preference_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    token_rewards: Tensor | None,
    responses: Responses,
    objective: Objective,
    pair_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed loss of a micro-batch of pairs, and the sums from which its metrics are averaged.

    Args:
        logps: [tokens] fp32, log pi_theta of each response token in nats, with gradient.
        ref_logps: [tokens] fp32, the same of the reference model; may be None for a reference-free objective.
        token_rewards: [tokens] fp32, r_t; may be None if the objective does not read them.
        responses: which token belongs to which response; if they are split over context-parallel ranks, the inputs are
            this rank's part.
        objective: the loss and its hyper-parameters.
        pair_weights: [pairs] fp32, factors of the pairs' whole losses; None: 1 each.

    Returns:
        loss: [] fp32, sum over the pairs. T-REG, section 3: L_pref + alpha * w * (L_reg(y_w) + L_reg(y_l)); with
            ``token_values=margin`` L_pref of rewards in which each token has its weight.
        sums: metric name -> [] fp32 without gradient, a sum over pairs (or over tokens for the names in ``COUNTS``).
            The losses among them are weighted, all others are not.
    """
    logps = logps.float()
    ref_logps = torch.zeros_like(logps) if ref_logps is None else ref_logps.float()
    per_token = objective.beta * torch.ones_like(logps)
    if objective.is_length_normalized:
        per_token = objective.beta * responses.spread(1.0 / responses.tokens)
    log_ratio = logps - ref_logps if objective.needs_reference else logps
    rewards = _token_rewards(log_ratio, token_rewards, objective)
    in_margin = objective.token_values == "margin"
    factor = None if rewards is None else objective.alpha * rewards  # of a token's gradient, less 1
    if in_margin:
        weights = _token_weights(logps.detach(), rewards, responses, objective)
        per_token, factor = per_token * weights, weights - 1

    # all sums at once: on GPUs a kernel costs more than these few numbers
    values = {"reward": per_token * log_ratio, "log_ratio": log_ratio, "logps": logps}
    if rewards is not None and factor is not None:
        outside = (factor.abs() > 0.25).float()
        values |= {"token_reward": rewards, "outside": outside}
        if not in_margin:
            values["regularization"] = -per_token * rewards * logps
    summed = dict(zip(values, responses.sums(*values.values()), strict=True))
    chosen, rejected = summed["reward"]
    margin = chosen - rejected
    preference = _PREFERENCE[objective.loss_type](summed["reward"], summed["log_ratio"], responses, objective)
    loss = preference

    weight = torch.ones_like(margin)
    if objective.weight == "dynamic":
        weight = torch.sigmoid(-(margin - objective.gamma if objective.weight_margin else margin)).detach()
    regularization = torch.zeros_like(margin)
    if "regularization" in summed:
        chosen_reg, rejected_reg = summed["regularization"]
        regularization = weight * (chosen_reg + rejected_reg)
        if objective.alpha > 0:
            loss = loss + objective.alpha * regularization
    chosen_logps, rejected_logps = summed["logps"]
    if objective.sft_loss_weight > 0:
        loss = loss - objective.sft_loss_weight * chosen_logps
    if pair_weights is not None:
        loss, preference, regularization = (pair_weights * each for each in (loss, preference, regularization))

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
        **({} if pair_weights is None else {PAIR_WEIGHT: pair_weights}),
        **_token_counts(responses),
        **_token_reward_sums(summed),
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


# -- preference losses: rewards and log-ratios as sums over responses -> [pairs] --------------------------------------


def _dpo(rewards: Pair, log_ratios: Pair, responses: Responses, o: Objective) -> Tensor:
    """-log sigma(margin) (DPO, arXiv 2305.18290, eq. 7); flipped with probability eps in cDPO (its section 3 note).

    For dpo_norm the margin is that of beta/|y| log(pi/pi_ref) (length-normalized DPO of Tulu 3, arXiv 2411.15124); for
    simpo that of beta/|y| log pi, less gamma (SimPO, arXiv 2405.14734, eq. 6).
    """
    margin = rewards[0] - rewards[1]
    if o.gamma:
        margin = margin - o.gamma
    return -(1 - o.label_smoothing) * F.logsigmoid(margin) - o.label_smoothing * F.logsigmoid(-margin)


def _robust(rewards: Pair, log_ratios: Pair, responses: Responses, o: Objective) -> Tensor:
    """(-(1 - eps) log sigma(margin) + eps log sigma(-margin)) / (1 - 2 eps): DPO's loss in expectation, if a fraction
    eps of the pairs is flipped (robust DPO, arXiv 2403.00409)."""
    margin, eps = rewards[0] - rewards[1], o.label_smoothing
    return (-(1 - eps) * F.logsigmoid(margin) + eps * F.logsigmoid(-margin)) / (1 - 2 * eps)


def _hinge(rewards: Pair, log_ratios: Pair, responses: Responses, o: Objective) -> Tensor:
    """max(0, 1 - margin) (SLiC-HF's calibration loss on DPO's margin: RSO, arXiv 2309.06657, section 3)."""
    return torch.relu(1 - (rewards[0] - rewards[1]))


def _exo(rewards: Pair, log_ratios: Pair, responses: Responses, o: Objective) -> Tensor:
    """sigma(m) (log sigma(m) - log(1 - eps)) + sigma(-m) (log sigma(-m) - log eps): reverse KL divergence of the
    policy's preference from the smoothed one (EXO for pairs, arXiv 2402.00856, eq. 16)."""
    margin, eps = rewards[0] - rewards[1], o.label_smoothing
    return torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log(1 - eps)) + torch.sigmoid(-margin) * (
        F.logsigmoid(-margin) - math.log(eps)
    )


def _nca(rewards: Pair, log_ratios: Pair, responses: Responses, o: Objective) -> Tensor:
    """-log sigma(r_w) - 0.5 log sigma(-r_w) - 0.5 log sigma(-r_l) (NCA for pairs, arXiv 2402.05369)."""
    chosen, rejected = rewards
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _apo_zero(rewards: Pair, log_ratios: Pair, responses: Responses, o: Objective) -> Tensor:
    """1 - sigma(r_w) + sigma(r_l): raises chosen and lowers rejected responses (APO-zero, arXiv 2408.06266, eq. 7)."""
    return 1 - torch.sigmoid(rewards[0]) + torch.sigmoid(rewards[1])


def _apo_down(rewards: Pair, log_ratios: Pair, responses: Responses, o: Objective) -> Tensor:
    """sigma(r_w) + 1 - sigma(r_w - r_l): lowers both, the rejected response more (APO-down, arXiv 2408.06266, eq. 8),
    for a policy that is better than the chosen responses."""
    return torch.sigmoid(rewards[0]) + 1 - torch.sigmoid(rewards[0] - rewards[1])


def _ipo(rewards: Pair, log_ratios: Pair, responses: Responses, o: Objective) -> Tensor:
    """(h - 1/(2 beta))^2 (IPO, arXiv 2310.12036, eq. 17), where h is the difference of the log-ratios.

    Log-ratios are averaged over the tokens of a response, as in the authors' follow-up and in TRL.
    """
    (chosen, rejected), tokens = log_ratios, responses.tokens
    return (chosen / tokens[0::2] - rejected / tokens[1::2] - 1 / (2 * o.beta)) ** 2


def _sft(rewards: Pair, log_ratios: Pair, responses: Responses, o: Objective) -> Tensor:
    """-log pi(y_w): maximum likelihood of the chosen responses; the rejected ones only enter the metrics."""
    return -log_ratios[0]


_PREFERENCE: dict[str, Callable[[Pair, Pair, Responses, Objective], Tensor]] = {
    "dpo": _dpo,
    "dpo_norm": _dpo,
    "simpo": _dpo,
    "ipo": _ipo,
    "robust": _robust,
    "hinge": _hinge,
    "exo": _exo,
    "nca": _nca,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "sft": _sft,
}


# -- weights of tokens inside the margin -------------------------------------------------------------------------------


def _token_weights(logps: Tensor, rewards: Tensor | None, responses: Responses, o: Objective) -> Tensor:
    """w_t of each token, [tokens] fp32 without gradient: a response's reward is the sum of beta w_t l_t, where l_t is
    log pi/pi_ref, or log pi of an objective without reference; beta/|y| takes beta's place where it is
    length-normalised, and |y| is the number of tokens that count where only some do.

    linear      1 + alpha r_t on the chosen, 1 - alpha r_t on the rejected response (TGDPO, arXiv 2506.14574, where r_t
                is beta log pi_oracle/pi_ref)
    importance  exp(alpha d_t) on the chosen, exp(-alpha d_t) on the rejected response, clipped, where d_t is
                log pi_better/pi_worse and r_t = sigma(d_t) - 0.5 (TIS-DPO, arXiv 2410.04350, without its term
                in the sequential KL divergence, which needs the whole vocabulary)
    select      1 on the share of highest reward of the chosen, of lowest of the rejected response (SePO,
                arXiv 2408.13518)
    decay       gamma^t for token t = 0, 1, ... (D2PO, arXiv 2502.14340)
    confident   1 where pi(y_t) is below its mean over the response (ConfPO, arXiv 2506.08712); nothing of a response
                whose tokens are equally probable
    """
    sign = 1.0 - 2.0 * (responses.segments % 2)
    if o.token_weight == "decay":
        assert responses.positions is not None
        return o.token_decay ** responses.positions.float()
    if o.token_weight == "confident":
        probability = logps.exp()
        mean = responses.total(probability) / responses.tokens
        return _of_counted((probability < responses.spread(mean)).float(), responses, o)
    if o.token_weight == "select":
        assert responses.ranks is not None
        tokens = responses.spread(responses.tokens)
        counted = torch.ceil(o.token_share * tokens)
        from_the_end = torch.where(sign > 0, responses.ranks, tokens - 1 - responses.ranks)
        return _of_counted((from_the_end < counted).float(), responses, o)
    assert rewards is not None
    if o.token_weight == "linear":
        return 1 + o.alpha * sign * rewards
    least, greatest = o.token_weight_range
    return torch.exp(o.alpha * sign * torch.logit(rewards + 0.5)).clamp(least, greatest)


def _of_counted(counts: Tensor, responses: Responses, o: Objective) -> Tensor:
    """Weights of tokens that count (1) or not (0): a length-normalised reward is the mean over those that count."""
    if not o.is_length_normalized:
        return counts
    number = responses.total(counts)
    return counts * responses.spread(responses.tokens / number.clamp(min=1))


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


def _token_counts(responses: Responses) -> dict[str, Tensor]:
    tokens = responses.tokens
    return {"tokens/chosen": tokens[0::2], "tokens/rejected": tokens[1::2], "tokens": tokens}


def _token_reward_sums(summed: dict[str, Pair]) -> dict[str, Tensor]:
    if "token_reward" not in summed:
        return {}
    chosen, rejected = summed["token_reward"]
    return {
        "treg/token_reward_chosen": chosen,
        "treg/token_reward_rejected": rejected,
        "treg/factor_outside_quarter": torch.cat(summed["outside"]),
    }


def _refuse_if(condition: bool, reason: str) -> None:
    if condition:
        raise UserError(reason)
