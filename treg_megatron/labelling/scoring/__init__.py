"""Teacher-forced log-probs of a reference model: the interface :class:`Scorer` and its engines.

``scoring.huggingface`` runs the model on one device, ``scoring.megatron`` splits it over ranks.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from treg_megatron.data.labelled_pairs import SIDES, LabelledPair


class ScoredSequence(NamedTuple):
    """A prompt of at least one token, and the response to score after it, both as token ids."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def read(self) -> np.ndarray:
        """[length - 1] int64, the tokens that a model reads: the last one is only predicted."""
        return np.array([*self.prompt_ids, *self.response_ids[:-1]], dtype=np.int64)


def sequences_of(pair: LabelledPair) -> list[ScoredSequence]:
    """Prompt and response of each side, in the order of ``SIDES``."""
    sequences = []
    for side in SIDES:
        tokens, response = getattr(pair, f"{side}_tokens").tolist(), len(getattr(pair, f"{side}_token_rewards"))
        sequences.append(ScoredSequence(tokens[:-response], tokens[-response:]))
    return sequences


class Scorer(Protocol):
    """A reference model that scores responses.

    Attributes:
        max_length: the model's maximum number of positions; sequences must not be longer.
        vocab_size: the number of ids that have an embedding.
    """

    max_length: int
    vocab_size: int

    def score(
        self, sequences: Sequence[ScoredSequence], scored: Callable[[int, int], None] = lambda sequences, tokens: None
    ) -> list[np.ndarray]:
        """log p(response token | everything before it) in nats, [response length] fp32 for each sequence, in order.

        ``scored`` is called after each batch with its numbers of sequences and tokens.
        """
        ...
