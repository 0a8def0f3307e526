"""Where token rewards come from: which log-probs beside the reference's are needed, and what they become.

A source names its passes. Each scores the same response ids by some model after some prompt.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from treg_megatron.config.schema import LabelSection
from treg_megatron.data.pairs import Pair
from treg_megatron.data.responses import prompt_answers
from treg_megatron.errors import UserError
from treg_megatron.labelling.contrastive import contrastive_rewards
from treg_megatron.labelling.prompt_pair import PromptPair, load_prompt_pair
from treg_megatron.labelling.squash import SIGMOID, squashed
from treg_megatron.tokenizer.chat import ChatTokenizer

BETTER, WORSE, REFERENCE = "better", "worse", "reference"


class Model(NamedTuple):
    """A model that scores responses: its Hugging Face folder, and its Megatron checkpoint if it runs there."""

    folder: str
    checkpoint: str


class Source(Protocol):
    """A source of token rewards.

    Attributes:
        passes: names of the log-probs that it needs beside those of the reference after the prompt itself.
        models: for each pass, the model that scores it.
    """

    passes: tuple[str, ...]
    models: Mapping[str, Model]

    def prompts(self, pair: Pair, response: str, prompt_ids: list[int], tokenizer: ChatTokenizer) -> dict[str, list]:
        """Token ids of each pass's prompt for one response; ``prompt_ids`` are those of the pair's own prompt."""
        ...

    def rewards(self, logps: Mapping[str, np.ndarray]) -> np.ndarray:
        """Token rewards, [n] fp32, from the log-probs of a response by pass and of the reference, [n] fp32 each."""
        ...

    def identity(self) -> dict[str, Any]:
        """What it adds to the fingerprint of a run."""
        ...


def source_of(section: LabelSection) -> Source:
    """The source that a recipe names.

    Raises:
        UserError: a model is missing, the scale is not positive, or a key belongs to the other source.
    """
    if section.source == "contrastive_prompts":
        for name in ("better_model", "worse_model", "better_checkpoint", "worse_checkpoint"):
            if getattr(section, name) is not None:
                raise UserError(f"label.{name} belongs to label.source=model_ratio; set that, or leave it null")
        if section.squash not in ("auto", SIGMOID):
            raise UserError("label.squash: rewards of contrastive prompts are T-REG's sigmoid; leave it at auto")
        reference = Model(section.model, section.checkpoint)
        return ContrastivePrompts(load_prompt_pair(section.prompt_pair), reference)
    if section.better_model is None:
        raise UserError("label.source is model_ratio, but label.better_model has no value")
    if not section.ratio_scale > 0:
        raise UserError(f"label.ratio_scale={section.ratio_scale} must be positive")
    models = {BETTER: _model(section, BETTER)}
    if section.worse_model is not None:
        models[WORSE] = _model(section, WORSE)
    return ModelRatio(models, section.ratio_scale, SIGMOID if section.squash == "auto" else section.squash)


def _model(section: LabelSection, name: str) -> Model:
    folder, checkpoint = getattr(section, f"{name}_model"), getattr(section, f"{name}_checkpoint")
    if section.engine == "megatron" and checkpoint is None:
        raise UserError(f"label.engine is megatron, but label.{name}_checkpoint has no value")
    return Model(folder, checkpoint or "")


class ContrastivePrompts:
    """The reference model after a better and a worse prompt (T-REG, arXiv 2412.02685, section 3.2)."""

    passes: tuple[str, ...] = (BETTER, WORSE)

    def __init__(self, prompt_pair: PromptPair, reference: Model):
        self._pair = prompt_pair
        self.models: Mapping[str, Model] = dict.fromkeys(self.passes, reference)

    def prompts(self, pair: Pair, response: str, prompt_ids: list[int], tokenizer: ChatTokenizer) -> dict[str, list]:
        """See :class:`Source`."""
        answers = prompt_answers(pair)
        return {
            BETTER: tokenizer.encode_prompt(self._pair.better(pair.messages, response), pair.tools, answers),
            WORSE: tokenizer.encode_prompt(self._pair.worse(pair.messages, response), pair.tools, answers),
        }

    def rewards(self, logps: Mapping[str, np.ndarray]) -> np.ndarray:
        """See :class:`Source`."""
        return contrastive_rewards(logps[BETTER], logps[WORSE])

    def identity(self) -> dict[str, Any]:
        """See :class:`Source`."""
        return {"prompt_pair": {"name": self._pair.name, "sha256": self._pair.sha256}}


class ModelRatio:
    """The log-ratio log pi_better(y_t) - log pi_worse(y_t) of two models after the pair's own prompt, squashed.

    With a model trained by DPO over its own reference this is DPO's token reward, up to beta (Rafailov et al., "From r
    to Q*", arXiv 2404.12358), as SePO (2408.13518) and TGDPO (2506.14574) use it; with two models trained on the pairs
    as they are and swapped, the importance estimate of TIS-DPO (2410.04350).

    Args:
        models: of the passes; without a worse one, the reference counts against a token.
        scale: factor of the log-ratio.
        squash: name of a function of :mod:`treg_megatron.labelling.squash`.
    """

    def __init__(self, models: Mapping[str, Model], scale: float, squash: str):
        self.models = models
        self.passes: tuple[str, ...] = tuple(models)
        self._scale, self._squash = scale, squash

    def prompts(self, pair: Pair, response: str, prompt_ids: list[int], tokenizer: ChatTokenizer) -> dict[str, list]:
        """See :class:`Source`."""
        return dict.fromkeys(self.passes, prompt_ids)

    def rewards(self, logps: Mapping[str, np.ndarray]) -> np.ndarray:
        """See :class:`Source`."""
        against = logps[WORSE if WORSE in self.passes else REFERENCE]
        return squashed(self._scale * (logps[BETTER].astype(np.float64) - against.astype(np.float64)), self._squash)

    def identity(self) -> dict[str, Any]:
        """See :class:`Source`."""
        from treg_megatron.models.huggingface import model_identity  # imports torch

        models = {name: model_identity(model.folder) for name, model in self.models.items()}
        return {"source": {"kind": "model_ratio", **models, "scale": self._scale, "squash": self._squash}}
