"""Token rewards from contrastive prompting (Zhou et al., "T-REG", ACL 2025, section 3.2)."""

import numpy as np

from treg_megatron.labelling.squash import SIGMOID, squashed


def contrastive_rewards(logps_better: np.ndarray, logps_worse: np.ndarray) -> np.ndarray:
    """Token rewards sigma(better - worse) - 0.5 of one response (T-REG, equation for r_t in section 3.2).

    Computed in fp64 and exactly odd: swapping the arguments flips the sign and changes nothing else.

    Args:
        logps_better: [n] floating point, nats; log pi_ref(y_t | x_better, y_<t) for response token t.
        logps_worse: [n], the same after x_worse.

    Returns:
        [n] fp32 in (-0.5, 0.5).
    """
    return squashed(logps_better.astype(np.float64) - logps_worse.astype(np.float64), SIGMOID)
