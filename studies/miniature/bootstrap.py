"""Means and AUROCs with hierarchical bootstrap intervals over references, seeds and prompts.

References are drawn with replacement, then seeds within each drawn reference; prompts, which all references share, are
drawn beside them. So an interval covers other references, seeds and prompts of the same kind, and that of few
references is too narrow: the draws vary (R - 1) / R times as much as R new ones would. Methods are compared on the
same draws, as their runs share references, seeds and prompts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95


class Estimate(NamedTuple):
    """A value, its 95 % bootstrap interval, and the two-sided bootstrap p-value of its being 0."""

    value: float
    low: float
    high: float
    p: float

    @property
    def sign(self) -> int:
        """1 or -1 if the entire interval is above or below 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


class Bootstrap:
    """One set of bootstrap draws, used for every figure.

    Args:
        references, seeds, prompts: number of references, of seeds for each, and of prompts.
        resamples: number of draws.
    """

    def __init__(self, references: int, seeds: int, prompts: int, resamples: int):
        generator = np.random.default_rng(0)
        drawn = generator.multinomial(references, np.full(references, 1 / references), resamples)
        #: [resamples, references, seeds], each draw adds up to 1
        self.run_weights = generator.multinomial(drawn * seeds, np.full(seeds, 1 / seeds)) / (references * seeds)
        #: [resamples, prompts]
        self.prompt_weights = generator.multinomial(prompts, np.full(prompts, 1 / prompts), resamples) / prompts

    def mean(self, values: np.ndarray) -> Estimate:
        """Mean of values [references, seeds, prompts], or [references, 1, prompts] of what has no seeds."""
        return self.estimate(values.mean(axis=2), values @ self.prompt_weights.T)

    def aurocs(self, scores: np.ndarray, positive: np.ndarray, prompt: np.ndarray) -> tuple[float, np.ndarray]:
        """AUROC of one run: probability that a positive token scores above a negative one, ties counted half.

        Args:
            scores: [n].
            positive: [n] bool.
            prompt: [n] int, the number of the prompt that a token belongs to.

        Returns:
            The AUROC over all prompts, and [resamples], those over drawn ones.
        """
        prompts = self.prompt_weights.shape[1]
        above, positives, negatives = _pairs_in_order(scores, positive, prompt, prompts)
        weights = np.concatenate([np.full((1, prompts), 1 / prompts), self.prompt_weights])
        found = ((weights @ above) * weights).sum(axis=1) / ((weights @ positives) * (weights @ negatives))
        return float(found[0]), found[1:]

    def estimate(self, by_run: np.ndarray, drawn: np.ndarray) -> Estimate:
        """Estimate from values of runs [references, seeds], and the same with prompts drawn, [..., resamples]."""
        weights = self.run_weights
        if by_run.shape[1] == 1:
            weights = weights.sum(axis=2, keepdims=True)
        over_runs = np.einsum("brs,rsb->b", weights, drawn)
        low, high = np.quantile(over_runs, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        beyond = 1 + min((over_runs <= 0).sum(), (over_runs >= 0).sum())
        return Estimate(float(by_run.mean()), float(low), float(high), min(1.0, 2 * beyond / (1 + len(over_runs))))


def adjusted(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: the p-values of a family, so that all that stay below a level hold together at that level."""
    order = np.argsort(p_values, kind="stable")
    result, largest = np.empty(len(p_values)), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, (len(p_values) - rank) * p_values[index])
        result[index] = min(1.0, largest)
    return result.tolist()


def _pairs_in_order(
    scores: np.ndarray, positive: np.ndarray, prompt: np.ndarray, prompts: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts by which the AUROC of any draw is a ratio of two forms that are quadratic in the prompts' weights.

    Returns:
        above: [prompts, prompts], number of pairs of a positive token of one prompt and a negative token of another in
        which the former scores higher, ties counted half. positives, negatives: [prompts], number of tokens.
    """
    order = np.argsort(scores, kind="stable")
    scores, positive, prompt = scores[order], positive[order], prompt[order]
    one_hot = np.zeros((len(scores) + 1, prompts))
    one_hot[np.flatnonzero(~positive) + 1, prompt[~positive]] = 1
    below = one_hot.cumsum(axis=0)  # [n + 1, prompts]: negatives among the first tokens
    first, last = (np.searchsorted(scores, scores[positive], side) for side in ("left", "right"))
    above = np.zeros((prompts, prompts))
    np.add.at(above, prompt[positive], (below[first] + below[last]) / 2)
    return above, np.bincount(prompt[positive], minlength=prompts), below[-1]
