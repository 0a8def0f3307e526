"""Sampling of responses: the interface :class:`Sampler` and one engine per generation backend.

Prompts are passed as the token ids that labelling and training will see, so that no engine adds a BOS token of its own.
Responses are returned as the sampled ids.
"""

from collections.abc import Sequence
from typing import Protocol

from treg_megatron.tokenizer.conversation import Sampled


class Sampler(Protocol):
    """A model that generates responses."""

    def sample(self, prompts: Sequence[list[int]], seed: int) -> list[Sampled]:
        """One response to each prompt (token ids), in order; deterministic for given prompts and seed."""
        ...
