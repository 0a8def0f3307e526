"""Means and AUROCs with bootstrap intervals over seeds and prompts.

Seeds and prompts are drawn independently, with replacement, so an interval covers other seeds and other prompts of the
same kind. Two methods are compared on the same draws: their runs share seeds, and all runs share prompts.
"""

from typing import NamedTuple

import numpy as np

LEVEL = 0.95


class Estimate(NamedTuple):
    """A value and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the entire interval is on one side of 0."""
        return self.low > 0 or self.high < 0


class Bootstrap:
    """One set of bootstrap draws, used for every figure.

    Args:
        seeds, prompts: number of seeds and of prompts.
        resamples: number of draws.
    """

    def __init__(self, seeds: int, prompts: int, resamples: int):
        generator = np.random.default_rng(0)
        self.seed_weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds
        self.prompt_weights = generator.multinomial(prompts, np.full(prompts, 1 / prompts), resamples) / prompts

    def mean(self, values: np.ndarray) -> Estimate:
        """Mean of values [seeds, prompts]; with one seed, [1, prompts], only prompts are drawn."""
        return self.estimate(values.mean(axis=1), values @ self.prompt_weights.T)

    def auroc(self, scores: np.ndarray, positive: np.ndarray, prompt: np.ndarray) -> Estimate:
        """AUROC: probability that a positive token scores above a negative one, mean over seeds.

        Args:
            scores: [seeds, n].
            positive: [n] bool.
            prompt: [n] int, index of the prompt that a token belongs to.
        """
        return self.estimate(*self.aurocs(scores, positive, prompt))

    def aurocs(self, scores: np.ndarray, positive: np.ndarray, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AUROCs of each seed, for :meth:`estimate`: [seeds] over all prompts, [seeds, resamples] over draws."""
        weights = np.concatenate([np.ones((1, self.prompt_weights.shape[1])), self.prompt_weights])
        found = np.stack([_weighted_aurocs(row, positive, weights[:, prompt]) for row in scores])
        return found[:, 0], found[:, 1:]

    def estimate(self, by_seed: np.ndarray, drawn: np.ndarray) -> Estimate:
        """Estimate from values per seed [seeds], and the same with prompts drawn [seeds, resamples]."""
        over_seeds = drawn[0] if len(drawn) == 1 else np.einsum("rs,sr->r", self.seed_weights, drawn)
        low, high = np.quantile(over_seeds, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Estimate(float(by_seed.mean()), float(low), float(high))


def _weighted_aurocs(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC under each draw's weights: [n], [n] bool, [draws, n] -> [draws]; ties count half."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(scores[order]) != 0]))  # starts of groups of equal scores
    result = np.empty(len(weights))
    for draw, row in enumerate(weights):
        positives = np.add.reduceat(np.where(positive, row, 0.0)[order], starts)
        negatives = np.add.reduceat(np.where(positive, 0.0, row)[order], starts)
        below = np.cumsum(negatives) - negatives
        result[draw] = (positives * (below + negatives / 2)).sum() / (positives.sum() * negatives.sum())
    return result
