"""Arena-Hard's scores: Bradley-Terry strengths, as the chance to win against the baseline.

Every game is one of an arm against the same baseline, so the Bradley-Terry model has one free strength per arm, and at
its maximum likelihood the arm's chance to win equals its share of the points: 1 for a game won, 1/2 for a tie. That is
the number that arena-hard-auto prints, which fits a logistic regression for v0.1 and takes the mean for v2
(``show_result.py`` in https://github.com/lmarena/arena-hard-auto). A clear verdict ([[A>>B]]) counts as three games.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from treg_megatron.evaluation.intervals import CONFIDENCE, ROUNDS, SEED
from treg_megatron.evaluation.judges.arena_hard import VERDICTS


class Game(NamedTuple):
    """The outcome of one game for the arm: ``points`` of 1, 1/2 or 0, repeated ``times``."""

    points: float
    times: int


def game(verdict: str | None, arm_first: bool) -> Game | None:
    """The game that a verdict such as ``A>>B`` decides, or None for anything that is no verdict.

    Args:
        arm_first: whether assistant A is the arm.
    """
    if verdict not in VERDICTS:
        return None
    points, times = VERDICTS[verdict]
    return Game(points if arm_first else 1.0 - points, times)


def score(games: Sequence[Game]) -> float:
    """The chance to win against the baseline in percent, by maximum likelihood."""
    points, times = np.array(games, dtype=float).T
    return float(100 * points @ times / times.sum())


def score_interval(games: Sequence[Game], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Percentile bootstrap interval of :func:`score` in percent, over single games as in arena-hard-auto.

    The repetitions of a clear verdict and the two games of a prompt are drawn as if they were independent of each
    other. They are not, so this interval is narrower than one over prompts.
    """
    points, times = np.array(games, dtype=float).T
    outcomes, which = np.unique(points, return_inverse=True)
    played = np.bincount(which, weights=times)
    total = int(played.sum())
    drawn = np.random.default_rng(SEED).multinomial(total, played / total, size=ROUNDS)
    low, high = np.quantile(100 * drawn @ outcomes / total, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
