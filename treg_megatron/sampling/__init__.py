"""Sampling of responses: the interface :class:`Sampler` and one engine per generation backend.

Prompts are passed as the token ids that labelling and training will see, so that no engine adds a BOS token of its own.
Responses are returned as the sampled ids.
"""

from collections.abc import Sequence
from typing import Protocol

from treg_megatron.sampling.decoding import Decoding
from treg_megatron.tokenizer.conversation import Sampled


class EngineSettings(Protocol):
    """What an engine needs to know of a recipe's section; its keys of the same names are explained there.

    Attributes:
        context_length: tokens of prompt and response together; None: as many as the model takes.
    """

    model: str
    engine: str
    server: str | None
    server_model: str | None
    timeout: float
    max_attempts: int
    dtype: str
    device: str

    @property
    def context_length(self) -> int | None: ...


class Sampler(Protocol):
    """A model that generates responses."""

    def sample(self, prompts: Sequence[list[int]], seed: int, decoding: Decoding) -> list[Sampled]:
        """One response to each prompt (token ids), in order; deterministic for given arguments."""
        ...
