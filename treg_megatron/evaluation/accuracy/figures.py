"""Accuracies and margins of a policy on preference pairs, from the log-probs of both responses.

With log pi(y) the sum of log pi(y_t | x, y_<t) over the |y| tokens of a response y, in nats:

    implicit reward             beta log(pi(y) / pi_ref(y))         DPO's (arXiv:2305.18290), TRL's rewards/*
    implicit reward per token   beta / |y| log(pi(y) / pi_ref(y))   of length-normalized DPO (arXiv:2411.15124)
    log-prob                    log pi(y)
    log-prob per token          log pi(y) / |y|                     SimPO's reward (arXiv:2405.14734) over beta

An accuracy is the share of pairs whose chosen response has more of it than the rejected one; a tie is not more, as in
TRL. A margin is the mean of the chosen response's minus the rejected one's.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from treg_megatron.evaluation.accuracy.cluster_bootstrap import ratio_intervals

REWARDS = ("implicit_reward", "implicit_reward_per_token", "log_prob", "log_prob_per_token")


@dataclass(frozen=True)
class PairLogProbs:
    """Log-probs of preference pairs, chosen in column 0 and rejected in column 1.

    Attributes:
        policy: [pairs, 2] float64, log pi of each response, in nats.
        reference: [pairs, 2] float64, log pi_ref of it.
        tokens: [pairs, 2] int64, its number of scored tokens.
        prompts: [pairs] int64, a number for each prompt: pairs of the same prompt are not independent.
    """

    policy: np.ndarray
    reference: np.ndarray
    tokens: np.ndarray
    prompts: np.ndarray

    def __getitem__(self, pairs: np.ndarray) -> "PairLogProbs":
        """The pairs that a mask or an index selects."""
        return PairLogProbs(*(values[pairs] for values in vars(self).values()))

    def __len__(self) -> int:
        return len(self.prompts)

    def rewards(self, beta: float) -> dict[str, np.ndarray]:
        """Each of :data:`REWARDS`, [pairs, 2] float64."""
        implicit = beta * (self.policy - self.reference)
        return {
            "implicit_reward": implicit,
            "implicit_reward_per_token": implicit / self.tokens,
            "log_prob": self.policy,
            "log_prob_per_token": self.policy / self.tokens,
        }


def preference_figures(pairs: PairLogProbs, beta: float, confidence: float) -> dict[str, Any]:
    """Accuracies, margins and drift over pairs, each with an interval.

    Args:
        pairs: at least one.
        beta: of the implicit reward.
        confidence: of the intervals, by a bootstrap over prompts.

    Returns:
        ``pairs``; ``NAME_accuracy`` and ``NAME_margin`` for each of :data:`REWARDS`; ``reference_log_prob_accuracy``
        and ``reference_log_prob_per_token_accuracy``, what the reference has without training;
        ``chosen_logps_change`` and ``rejected_logps_change``, the mean of log pi(y) - log pi_ref(y) in nats, and the
        same over all tokens with ``_per_token``. Each of the latter has a ``..._interval`` beside it.
    """
    ones = np.ones(len(pairs))
    ratios: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # a figure is sum of the first over sum of the second
    for name, reward in pairs.rewards(beta).items():
        margin = reward[:, 0] - reward[:, 1]
        ratios[f"{name}_accuracy"] = (margin > 0).astype(np.float64), ones
        ratios[f"{name}_margin"] = margin, ones
    for name, log_prob in (
        ("reference_log_prob", pairs.reference),
        ("reference_log_prob_per_token", pairs.reference / pairs.tokens),
    ):
        ratios[f"{name}_accuracy"] = (log_prob[:, 0] > log_prob[:, 1]).astype(np.float64), ones
    change = pairs.policy - pairs.reference
    for side, name in enumerate(("chosen", "rejected")):
        ratios[f"{name}_logps_change"] = change[:, side], ones
        ratios[f"{name}_logps_change_per_token"] = change[:, side], pairs.tokens[:, side].astype(np.float64)
    figures: dict[str, Any] = {"pairs": len(pairs)}
    numerators, denominators = (np.stack(column, axis=1) for column in zip(*ratios.values(), strict=True))
    found, intervals = ratio_intervals(numerators, denominators, pairs.prompts, confidence)
    for name, value, interval in zip(ratios, found, intervals, strict=True):
        figures[name] = float(value)
        figures[f"{name}_interval"] = interval.tolist()
    return figures
