"""Where token rewards come from: which log-probs beside the reference's are needed, and what they become.

A source names its passes. Each scores the same response ids by some model after some prompt. One labelling may have
several sources: the main one, and those of the named values.
"""

import re
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from treg_megatron.config.recipe import with_changes
from treg_megatron.config.schema import SOURCE_KEYS, LabelSection
from treg_megatron.data.aligned import VALUES_NAME
from treg_megatron.data.pairs import Pair
from treg_megatron.data.responses import further_turns, prompt_answers
from treg_megatron.errors import UserError
from treg_megatron.labelling.contrastive import contrastive_rewards
from treg_megatron.labelling.import_rewards import response_rewards
from treg_megatron.labelling.prompt_pair import PromptPair, load_prompt_pair
from treg_megatron.labelling.squash import SIGMOID, squashed
from treg_megatron.tokenizer.chat import ChatTokenizer

BETTER, WORSE, REFERENCE, GIVEN = "better", "worse", "reference", "given"
MAIN = ""  # the name of the values that have none
_OF_MODEL_RATIO = ("better_model", "worse_model", "better_checkpoint", "worse_checkpoint")


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

    def prompts(
        self, pair: Pair, side: str, prompt_ids: list[int], response_ids: list[int], tokenizer: ChatTokenizer
    ) -> dict[str, list]:
        """Token ids of each pass's prompt for one side's response.

        Args:
            prompt_ids, response_ids: those of the pair's own prompt and of the response.

        Raises:
            UserError: the chat template does not render such a prompt.
        """
        ...

    def rewards(self, logps: Mapping[str, np.ndarray]) -> np.ndarray:
        """Token rewards, [n] fp32, from the log-probs of a response by pass and of the reference, [n] fp32 each."""
        ...

    def scores(self, name: str) -> Hashable:
        """What the pass ``name`` scores; equal for two passes whose log-probs are the same."""
        ...

    def identity(self) -> dict[str, Any]:
        """What it adds to the fingerprint of a run."""
        ...


def sources_of(section: LabelSection) -> "Sources":
    """The main source that a recipe names, and those of its named values.

    Raises:
        UserError: as :func:`source_of`, or the name of values has other characters than a-z, 0-9 and _.
    """
    by_name = {MAIN: source_of(section)}
    for name, changes in section.values.items():
        where = f"label.values.{name}"
        if not re.fullmatch(VALUES_NAME, name):
            raise UserError(f"{where}: a name of token rewards consists of a-z, 0-9 and _")
        by_name[name] = source_of(_changed(section, changes, where), where)
    return Sources(by_name, Model(section.model, section.checkpoint))


def _changed(section: LabelSection, changes: Mapping[str, Any], where: str) -> LabelSection:
    """The section of named values, without what belongs to the main source alone."""
    for name in changes:
        if name not in SOURCE_KEYS:
            raise UserError(f"{where}.{name} is not a key of a source, which are {', '.join(SOURCE_KEYS)}")
    source = changes.get("source", section.source)
    for name, its in (("prompt_pair", "contrastive_prompts"), ("ratio_scale", "model_ratio")):
        if name in changes and source != its:
            raise UserError(f"{where}.{name} belongs to {where}.source={its}; set that, or leave it out")
    if source != section.source:
        changes = {**dict.fromkeys(_OF_MODEL_RATIO), "squash": "auto", **changes}
    return with_changes(section, changes, where)


def source_of(section: LabelSection, where: str = "label") -> Source:
    """The source that a section names; ``where`` is its full name in the recipe.

    Raises:
        UserError: a model is missing, the scale is not positive, or a key belongs to another source.
    """
    if section.source != "model_ratio":
        for name in _OF_MODEL_RATIO:
            if getattr(section, name) is not None:
                raise UserError(f"{where}.{name} belongs to {where}.source=model_ratio; set that, or leave it null")
    if section.source == "own":
        return OwnValues(section.squash)
    if section.source == "contrastive_prompts":
        if section.squash not in ("auto", SIGMOID):
            raise UserError(f"{where}.squash: rewards of contrastive prompts are T-REG's sigmoid; leave it at auto")
        reference = Model(section.model, section.checkpoint)
        return ContrastivePrompts(load_prompt_pair(section.prompt_pair), reference)
    if section.better_model is None:
        raise UserError(f"{where}.source is model_ratio, but {where}.better_model has no value")
    if not section.ratio_scale > 0:
        raise UserError(f"{where}.ratio_scale={section.ratio_scale} must be positive")
    models = {BETTER: _model(section, BETTER, where)}
    if section.worse_model is not None:
        models[WORSE] = _model(section, WORSE, where)
    return ModelRatio(models, section.ratio_scale, SIGMOID if section.squash == "auto" else section.squash)


def _model(section: LabelSection, name: str, where: str) -> Model:
    folder, checkpoint = getattr(section, f"{name}_model"), getattr(section, f"{name}_checkpoint")
    if section.engine == "megatron" and checkpoint is None:
        raise UserError(f"label.engine is megatron, but {where}.{name}_checkpoint has no value")
    return Model(folder, checkpoint or "")


class ContrastivePrompts:
    """The reference model after a better and a worse prompt (T-REG, arXiv 2412.02685, section 3.2)."""

    passes: tuple[str, ...] = (BETTER, WORSE)

    def __init__(self, prompt_pair: PromptPair, reference: Model):
        self._pair = prompt_pair
        self.models: Mapping[str, Model] = dict.fromkeys(self.passes, reference)

    def prompts(
        self, pair: Pair, side: str, prompt_ids: list[int], response_ids: list[int], tokenizer: ChatTokenizer
    ) -> dict[str, list]:
        """See :class:`Source`."""
        response = getattr(pair, side)
        prompts = {
            BETTER: self._pair.better(pair.messages, response),
            WORSE: self._pair.worse(pair.messages, response),
        }
        if not self._pair.answers_first:
            answers = prompt_answers(pair)
            return {name: tokenizer.encode_prompt(prompt, pair.tools, answers) for name, prompt in prompts.items()}
        answered = [*prompt_ids, *response_ids]
        try:
            return {
                name: [*answered, *further_turns(pair, side, response_ids, prompt[len(pair.messages) + 1 :], tokenizer)]
                for name, prompt in prompts.items()
            }
        except UserError as error:
            raise UserError(
                f"{error}; prompt pair {self._pair.name} asks in a further turn, which this rules out: use prompt pair "
                "revise instead"
            ) from None

    def rewards(self, logps: Mapping[str, np.ndarray]) -> np.ndarray:
        """See :class:`Source`."""
        return contrastive_rewards(logps[BETTER], logps[WORSE])

    def scores(self, name: str) -> Hashable:
        """See :class:`Source`."""
        return self.models[name], self._pair.sha256, name

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

    def prompts(
        self, pair: Pair, side: str, prompt_ids: list[int], response_ids: list[int], tokenizer: ChatTokenizer
    ) -> dict[str, list]:
        """See :class:`Source`."""
        return dict.fromkeys(self.passes, prompt_ids)

    def rewards(self, logps: Mapping[str, np.ndarray]) -> np.ndarray:
        """See :class:`Source`."""
        against = logps[WORSE if WORSE in self.passes else REFERENCE]
        return squashed(self._scale * (logps[BETTER].astype(np.float64) - against.astype(np.float64)), self._squash)

    def scores(self, name: str) -> Hashable:
        """See :class:`Source`."""
        return _after_the_prompt(self.models[name])

    def identity(self) -> dict[str, Any]:
        """See :class:`Source`."""
        from treg_megatron.models.huggingface import model_identity  # imports torch

        models = {name: model_identity(model.folder) for name, model in self.models.items()}
        return {"source": {"kind": "model_ratio", **models, "scale": self._scale, "squash": self._squash}}


class OwnValues:
    """The user's own values per token, which the pairs bring (:mod:`treg_megatron.labelling.import_rewards`).

    Args:
        squash: name of a function of :mod:`treg_megatron.labelling.squash`, or ``auto`` for values in [-0.5, 0.5].
    """

    passes: tuple[str, ...] = ()
    models: Mapping[str, Model] = {}

    def __init__(self, squash: str):
        self._squash = squash

    def prompts(self, *of_response: Any) -> dict[str, list]:
        """See :class:`Source`: none."""
        return {}

    def given(self, pair: Pair, side: str, tokenizer: ChatTokenizer) -> np.ndarray:
        """Token rewards of one side's response, [n] fp32, from the columns of the pair's record.

        Raises:
            UserError: there are none, or they do not line up with the response's tokens.
        """
        try:
            return response_rewards(tokenizer, pair, side, dict(pair.own or {}), self._squash)[1]
        except ValueError as error:
            raise UserError(str(error)) from None

    def rewards(self, logps: Mapping[str, np.ndarray]) -> np.ndarray:
        """See :class:`Source`; what :meth:`given` returned stands among the log-probs as ``GIVEN``."""
        return logps[GIVEN].copy()

    def scores(self, name: str) -> Hashable:
        """See :class:`Source`: nothing."""
        return None

    def identity(self) -> dict[str, Any]:
        """See :class:`Source`."""
        return {"source": {"kind": "own", "squash": self._squash}}


class Sources:
    """The sources of one labelling by the name of their values, the main one first; equal passes are scored once.

    Args:
        by_name: the sources.
        reference: the reference model.

    Attributes:
        passes, models: as of a :class:`Source`, of all of them together.
        reads_own: whether one of them reads the values that the pairs bring.
    """

    def __init__(self, by_name: Mapping[str, Source], reference: Model):
        self.by_name = by_name
        self.models: dict[str, Model] = {}
        self._keys: dict[str, dict[str, str]] = {name: {} for name in by_name}  # each source's passes as named here
        known = {_after_the_prompt(reference): REFERENCE}
        for name, source in by_name.items():
            for each in source.passes:
                key = known.setdefault(source.scores(each), f"{name}.{each}" if name else each)
                self._keys[name][each] = key
                if key != REFERENCE:
                    self.models.setdefault(key, source.models[each])
        self.passes = tuple(self.models)
        self._own = {name: source for name, source in by_name.items() if isinstance(source, OwnValues)}
        self.reads_own = bool(self._own)

    def prompts(self, *of_response: Any) -> dict[str, list]:
        """See :class:`Source`."""
        prompts: dict[str, list] = {}
        for name, source in self.by_name.items():
            wanted = {each: key for each, key in self._keys[name].items() if key != REFERENCE and key not in prompts}
            if wanted:
                found = source.prompts(*of_response)
                prompts |= {key: found[each] for each, key in wanted.items()}
        return prompts

    def given(self, pair: Pair, side: str, tokenizer: ChatTokenizer) -> dict[str, np.ndarray]:
        """The values that the pair brings for one side's response, [n] fp32 each, by name.

        Raises:
            UserError: as :meth:`OwnValues.given`.
        """
        return {name: source.given(pair, side, tokenizer) for name, source in self._own.items()}

    def rewards(self, logps: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Token rewards of a response by name, [n] fp32 each, from log-probs by pass and what :meth:`given` gave."""
        rewards = {}
        for name, source in self.by_name.items():
            its = {each: logps[key] for each, key in self._keys[name].items()} | {REFERENCE: logps[REFERENCE]}
            rewards[name] = source.rewards(its | ({GIVEN: given[name]} if name in given else {}))
        return rewards

    def identity(self) -> dict[str, Any]:
        """See :class:`Source`."""
        named = {name: source.identity() for name, source in self.by_name.items() if name}
        return {**self.by_name[MAIN].identity(), **({"values": named} if named else {})}


def _after_the_prompt(model: Model) -> Hashable:
    return model, None, None
