"""Decoding settings that published evaluations used, by benchmark and model family: ``presets.yaml``."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from treg_megatron.config.schema import EvaluateSection
from treg_megatron.errors import UserError
from treg_megatron.sampling.decoding import Decoding
from treg_megatron.tokenizer.chat import ChatTokenizer
from treg_megatron.tokenizer.conversation import Message

FILE = Path(__file__).with_name("presets.yaml")
AUTO, NONE = "auto", "none"
OTHER = "other"  # the categories that a preset does not name
KEYS = ("temperature", "top_p", "max_new_tokens", "stop_tokens")

FROM_RECIPE = "the recipe"
_NO_STOPS = {"value": [], "source": "no family: the end-of-turn token alone"}


@dataclass(frozen=True)
class AnswerSettings:
    """How the answers of a run are drawn.

    Attributes:
        preset: the family that null keys were taken from, or :data:`NONE`.
        temperature: of each category of prompts, with :data:`OTHER` for the rest; or of all.
        top_p, max_new_tokens, stop_strings: as in :class:`~treg_megatron.sampling.decoding.Decoding`.
        stop_tokens: texts of the special tokens that end an answer besides the end-of-turn token.
        sources: where each of them comes from, by its key.
    """

    preset: str
    temperature: float | dict[str, float]
    top_p: float
    max_new_tokens: int
    stop_tokens: tuple[str, ...]
    stop_strings: tuple[str, ...]
    sources: dict[str, str]

    def decoding(self, category: str | None, tokenizer: ChatTokenizer) -> Decoding:
        """The decoding of a prompt of some category.

        Raises:
            UserError: the tokenizer has no such stop token.
        """
        temperature = self.temperature
        if isinstance(temperature, dict):
            temperature = temperature.get(category or OTHER, temperature[OTHER])
        stops = tuple(tokenizer.special_id(text) for text in self.stop_tokens)
        return Decoding(temperature, self.top_p, self.max_new_tokens, stops, self.stop_strings)

    def as_dict(self) -> dict[str, Any]:
        """What decides the answers, for manifests."""
        return {name: getattr(self, name) for name in (*KEYS[:-1],)} | {
            "stop_tokens": list(self.stop_tokens),
            "stop_strings": list(self.stop_strings),
        }

    def described(self) -> str:
        """One line per setting, with where it comes from."""
        values = self.as_dict()
        return "\n".join(f"  {name} {json.dumps(values[name])} ({source})" for name, source in self.sources.items())


def answer_settings(section: EvaluateSection, folder: Path, tokenizer: ChatTokenizer) -> AnswerSettings:
    """The settings of a recipe, with what it leaves null taken from a preset.

    Args:
        folder: of the model: its config.json tells the family, as does the tokenizer's chat template.

    Raises:
        UserError: there is no such preset, or a value is out of range.
    """
    presets = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    families = presets["families"]
    name = family_of(folder, tokenizer, families) if section.preset == AUTO else section.preset
    if name != NONE and name not in families:
        known = ", ".join((AUTO, NONE, *families))
        raise UserError(f"evaluate.preset is {section.preset!r}; choose one of {known}")
    # prompts of no benchmark: as AlpacaEval's, which are everyday instructions too
    benchmark = "alpaca_eval" if section.benchmark == "prompts" else section.benchmark
    family = families.get(name, {})
    found = {
        "stop_tokens": _NO_STOPS,
        **presets["benchmarks"][benchmark],
        **family.get("settings", {}),
        **family.get("benchmarks", {}).get(benchmark, {}),
    }
    values = {key: found[key]["value"] for key in KEYS}
    sources = {key: " ".join(found[key]["source"].split()) for key in KEYS}
    for key in KEYS:
        if getattr(section, key) is not None:
            values[key], sources[key] = getattr(section, key), FROM_RECIPE
    if section.stop_strings:
        sources["stop_strings"] = FROM_RECIPE
    settings = AnswerSettings(
        preset=name,
        temperature=values["temperature"],
        top_p=values["top_p"],
        max_new_tokens=values["max_new_tokens"],
        stop_tokens=tuple(values["stop_tokens"]),
        stop_strings=tuple(section.stop_strings),
        sources=sources,
    )
    _require_sensible(settings)
    return settings


def family_of(folder: Path, tokenizer: ChatTokenizer, families: dict[str, Any]) -> str:
    """The family of a model, or :data:`NONE`."""
    config = folder / "config.json"
    model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
    prompt = tokenizer.decode(tokenizer.encode_prompt([Message("user", "Why?")]))
    for name, family in families.items():
        if model_type in family["model_types"] and family["marker"] in prompt:
            return name
    return NONE


def _require_sensible(settings: AnswerSettings) -> None:
    temperature = settings.temperature
    lowest = min(temperature.values()) if isinstance(temperature, dict) else temperature
    if not lowest >= 0 or not 0 < settings.top_p <= 1 or settings.max_new_tokens < 1:
        raise UserError(
            f"evaluate.temperature={temperature} must not be negative, evaluate.top_p={settings.top_p} must lie in "
            f"(0, 1], and evaluate.max_new_tokens={settings.max_new_tokens} must be at least 1"
        )
    if "" in settings.stop_strings:
        raise UserError("evaluate.stop_strings holds an empty text, which would end every answer before it begins")
