"""Token rewards from contrastive prompting (Zhou et al., "T-REG", ACL 2025, section 3.2)."""

import numpy as np


def contrastive_rewards(logps_better: np.ndarray, logps_worse: np.ndarray) -> np.ndarray:
    """Token rewards sigma(better - worse) - 0.5 in (-0.5, 0.5), fp32, value t for response token t.

    Computed as tanh(difference / 2) / 2 in fp64, which is the same and exactly odd: swapped arguments change the sign
    and nothing else.
    """
    difference = logps_better.astype(np.float64) - logps_worse.astype(np.float64)
    return (np.tanh(difference / 2) / 2).astype(np.float32)
