"""Teacher-forced log-probs of a reference model: one interface, an engine for each way to hold the model.

An engine is any object with the attributes of :class:`Scorer`; ``scoring.huggingface`` has one for one device.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from treg_megatron.data.labelled_pairs import SIDES, LabelledPair


class ScoredSequence(NamedTuple):
    """A prompt of at least one token, and the response whose tokens are scored after it."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


def sequences_of(pair: LabelledPair) -> list[ScoredSequence]:
    """Prompt and response of each side, in the order of ``SIDES``."""
    sequences = []
    for side in SIDES:
        tokens, response = getattr(pair, f"{side}_tokens").tolist(), len(getattr(pair, f"{side}_token_rewards"))
        sequences.append(ScoredSequence(tokens[:-response], tokens[-response:]))
    return sequences


class Scorer(Protocol):
    """A reference model.

    Attributes:
        max_length: positions that the model knows; sequences must not be longer.
        vocab_size: ids below this have an embedding.
    """

    max_length: int
    vocab_size: int

    def score(
        self, sequences: Sequence[ScoredSequence], scored: Callable[[int, int], None] = lambda sequences, tokens: None
    ) -> list[np.ndarray]:
        """log p(response token | everything before it), fp32 [response length], for each sequence in its order.

        ``scored`` is told after each batch how many sequences and tokens it had.
        """
        ...
