"""Values of any size to token rewards in [-0.5, 0.5]."""

from collections.abc import Callable

import numpy as np

SIGMOID = "sigmoid"


def squashed(values: np.ndarray, name: str) -> np.ndarray:
    """Token rewards of the values of one response.

    sigmoid  sigma(x) - 0.5, as T-REG makes them of log-ratios (section 3.2)
    tanh     tanh(x) / 2, which is twice as steep
    clip     x where it lies in [-0.5, 0.5], else the nearer end
    rank     from -0.5 for the smallest value of the response to 0.5 for the largest, equal ones alike; 0 for a single
             token, and for tokens that are all alike

    Args:
        values: [n] finite floating point.
        name: of the function.

    Returns:
        [n] fp32; every function is odd, and rises with the value.
    """
    return _SQUASHES[name](values.astype(np.float64)).astype(np.float32)


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0 up, [n] float64; equal values share the mean of their ranks."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    before = np.cumsum(counts) - counts
    return (before + (counts - 1) / 2)[which]


def _ranks(values: np.ndarray) -> np.ndarray:
    if len(values) == 1:
        return np.zeros(1)
    return average_ranks(values) / (len(values) - 1) - 0.5


_SQUASHES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    SIGMOID: lambda values: np.tanh(values / 2) / 2,  # the same function, and exactly odd
    "tanh": lambda values: np.tanh(values) / 2,
    "clip": lambda values: np.clip(values, -0.5, 0.5),
    "rank": _ranks,
}
SQUASHES = tuple(_SQUASHES)
