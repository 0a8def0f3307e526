"""Confidence intervals by the percentile bootstrap over prompts, and the sign test.

Intervals are deterministic: which prompts are drawn depends on their number alone. Arms that answered the same prompts
are resampled alike, so the interval of a difference is a paired one. The BCa bootstrap covers no better here: it gains
where a win rate is near 0 or 100 %, and loses where most differences are 0.
"""

from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.95
ROUNDS = 5000
SEED = 20
_BLOCK = 1 << 22  # drawn numbers in memory at once


def mean_interval(values: Sequence[float] | np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Interval of the mean of ``values``, one per prompt.

    For the difference of two arms on the same prompts, give the differences. Values that do not vary, such as those of
    an arm that always wins, have an interval without width.
    """
    column = np.asarray(values, dtype=float)
    return interval(resampled_sums(column[:, None])[:, 0] / len(column), confidence)


def interval(resampled: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The interval that leaves out the same share of the resampled values on either side."""
    low, high = np.quantile(resampled, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def resampled_sums(columns: np.ndarray) -> np.ndarray:
    """Sums over each of ``ROUNDS`` resamples of the prompts (rounds x columns), for statistics that are made of sums.

    Args:
        columns: prompts x columns.
    """
    generator = np.random.default_rng(SEED)
    prompts = len(columns)
    chance = np.full(prompts, 1.0 / prompts)
    block = max(1, _BLOCK // prompts)
    sizes = [min(block, ROUNDS - begun) for begun in range(0, ROUNDS, block)]
    return np.concatenate([generator.multinomial(prompts, chance, size=size) @ columns for size in sizes])


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p-value of the exact sign test; ties are left out. 1 if there is neither win nor loss."""
    games, term, tail = wins + losses, 1, 0
    for k in range(min(wins, losses) + 1):
        tail += term  # the number of ways to win k games
        term = term * (games - k) // (k + 1)
    return min(1.0, 2 * tail / 2**games)
