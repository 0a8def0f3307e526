"""Bootstrap intervals of ratios of sums, resampling whole prompts."""

import numpy as np

from treg_megatron.evaluation.intervals import resampled_sums


def ratio_intervals(
    numerators: np.ndarray, denominators: np.ndarray, prompts: np.ndarray, confidence: float
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the numerators over the sum of the denominators, and a percentile interval, for k figures at once.

    Observations of one prompt are drawn together: they are not independent. Means are ratios with denominators of 1.

    Args:
        numerators: [n, k] float64.
        denominators: [n, k] float64, not negative; a prompt's must not all be 0.
        prompts: [n] int, which observations share a prompt.
        confidence: in (0, 1).

    Returns:
        [k] the ratios, and [k, 2] the ends of their intervals.
    """
    _, prompt_of = np.unique(prompts, return_inverse=True)
    count, k = int(prompt_of.max()) + 1, numerators.shape[1]
    sums = np.zeros((count, 2 * k))
    np.add.at(sums, prompt_of, np.concatenate([numerators, denominators], axis=1))
    totals = resampled_sums(sums)
    tail = (1 - confidence) / 2
    ends = np.quantile(totals[:, :k] / totals[:, k:], [tail, 1 - tail], axis=0).T
    return numerators.sum(axis=0) / denominators.sum(axis=0), ends
