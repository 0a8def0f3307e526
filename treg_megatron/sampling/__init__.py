"""Responses of a model to prompts: one interface, an engine for each way to generate.

The prompt goes in as the token ids that labelling and training will see, so that no engine adds a BOS of its own, and
the response comes back as the ids that were sampled.
"""

from collections.abc import Sequence
from typing import Protocol

from treg_megatron.tokenizer.conversation import Sampled


class Sampler(Protocol):
    """A model that answers."""

    def sample(self, prompts: Sequence[list[int]], seed: int) -> list[Sampled]:
        """One response to each prompt, in their order; the same for the same prompts and seed."""
        ...
