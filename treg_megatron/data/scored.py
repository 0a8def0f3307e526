"""Which tokens of a response are scored: all, or those of several assistant turns with other turns between them.

A response that spans turns of a user or a tool is stored as one suffix, like any other. The tokens that the assistant
does not write have :data:`NOT_SCORED` in place of a token reward; they are never scored, rewarded or trained.
"""

import numpy as np

#: Outside [-0.5, 0.5], and nothing that arithmetic gives by accident.
NOT_SCORED = np.float32(-9.0)


def is_scored(token_rewards: np.ndarray) -> np.ndarray:
    """[n] bool: which response tokens are scored."""
    return token_rewards != NOT_SCORED
