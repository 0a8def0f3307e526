"""A report as Markdown: the tables, the spread of lengths and scores, the ends of training, and a few answers."""

import re
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles
from typing import Any

from treg_megatron.evaluation.reporting.links import arm_links
from treg_megatron.evaluation.reporting.material import BASELINE, Answered, Material, PromptAnswers, values_over_steps
from treg_megatron.evaluation.reporting.notes import notes, of_benchmark
from treg_megatron.evaluation.reporting.shown import shown
from treg_megatron.evaluation.reporting.tables import Table, arm_table, difference_table, kl_of, measured

_EXAMPLES = 2  # answers of each arm that the judge liked most, and least
_SHOWN_CHARACTERS = 1200
# an underscore inside a word is none, nor a bracket that begins neither a link nor what one refers to
_MARKUP = re.compile(r"[\\`*{}<>|#&]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])")
_METRICS = ("loss", "rewards/margins", "rewards/accuracies", "validation/loss", "validation/rewards/accuracies")


def as_markdown(comparison: dict[str, Any], material: Material, folder: Path) -> str:
    """The report of a comparison; its links are relative to ``folder``."""
    parts = [f"# Evaluation{_inline(of_benchmark(comparison, 'on'))}", *map(_inline, notes(comparison))]
    parts += ["## Arms", _table(arm_table(comparison)), *_links(comparison, folder)]
    if comparison["differences"]:
        parts += ["## Differences", _table(difference_table(comparison))]
    if by_kl := _by_kl(comparison):
        parts += ["## Score against KL", by_kl]
    if material.prompts:
        parts += ["## Lengths, scores and preferences", _table(_spread(material))]
    if training := _training(comparison, material):
        parts += ["## Training", training]
    if material.prompts:
        parts += ["## Answers", "All answers are in report.html, side by side."]
        for number, name in list(enumerate(material.models))[BASELINE + 1 :]:
            parts += _examples(number, name, material)
    return "\n\n".join(parts) + "\n"


def _links(comparison: dict[str, Any], folder: Path) -> list[str]:
    lines = []
    for arm in comparison["arms"]:
        if links := arm_links(arm, folder):
            listed = ", ".join(f"[{name}](<{address}>)" for name, address in links)
            lines.append(f"* {_inline(arm['name'])}: {listed}")
    return ["\n".join(lines)] if lines else []


def _by_kl(comparison: dict[str, Any]) -> str | None:
    arms = [(kl_of(arm), arm) for arm in comparison["arms"]]
    known = sorted(((kl[0], kl[1], arm) for kl, arm in arms if kl[0] is not None), key=lambda row: row[0])
    if len(known) < 2:
        return None
    rows = [
        [
            measured(value, ends, form=".4f"),
            arm["name"],
            measured(arm["win_rate"], arm["win_rate_interval"]),
            measured(arm["length_controlled"], arm["length_controlled_interval"]),
        ]
        for value, ends, arm in known
    ]
    return _table(Table(["KL, nats a token", "arm", "win rate, %", "length-controlled, %"], rows))


def _spread(material: Material) -> Table:
    kinds: list[tuple[str, Callable[[Answered], float | None]]] = [
        ("characters", lambda answer: answer.characters),
        ("tokens", lambda answer: answer.tokens),
        ("score", lambda answer: answer.score),
        ("preference", lambda answer: answer.preference),
    ]
    rows = []
    for name, value in kinds:
        for number, model in enumerate(material.models):
            values = [found for answer in material.of_model(number) if (found := value(answer)) is not None]
            if len(values) > 1:
                ends = quantiles(values, n=20, method="inclusive")
                five = [ends[0], *(ends[i] for i in (4, 9, 14)), ends[-1]]
                rows.append([name, model, str(len(values)), *(f"{quantile:,.4g}" for quantile in five)])
    return Table(["of", "model", "answers", "5 %", "25 %", "median", "75 %", "95 %"], rows)


def _training(comparison: dict[str, Any], material: Material) -> str | None:
    rows = []
    for arm, records in zip(comparison["arms"], material.curves, strict=True):
        for name in _METRICS:
            if points := values_over_steps(records, name):
                (first_step, first), (last_step, last) = points[0], points[-1]
                rows.append([arm["name"], name, f"{first:.4g} (step {first_step})", f"{last:.4g} (step {last_step})"])
    return _table(Table(["arm", "metric", "first", "last"], rows)) if rows else None


def _examples(number: int, name: str, material: Material) -> list[str]:
    """The prompts where the judge preferred the arm's answer most, and least."""
    judged: list[tuple[float, PromptAnswers]] = []
    for prompt in material.prompts:
        answer = prompt.answers[number]
        if answer is not None and answer.preference is not None:
            judged.append((answer.preference, prompt))
    judged.sort(key=lambda pair: -pair[0])
    best, worst = judged[:_EXAMPLES], judged[_EXAMPLES:][::-1][:_EXAMPLES]
    parts = []
    for title, chosen in (("the judge's favourites", best), ("what it liked least", worst)):
        if chosen:
            parts.append(f"### {_inline(name)}: {title}")
        for preference, prompt in chosen:
            parts.append(f"Prompt {_inline(prompt.prompt_id)}, preference {preference:.2f}")
            parts.append(_block("\n\n".join(prompt.turns)))
            for model in (BASELINE, number):
                answer = prompt.answers[model]
                if answer is not None:
                    parts += [f"{_inline(material.models[model])}:", _block("\n\n".join(answer.texts))]
    return parts


def _table(table: Table) -> str:
    lines = [table.headings, ["---"] * len(table.headings), *table.rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return text if text == "---" else _inline(text)


def _inline(text: str) -> str:
    """Text without meaning to Markdown or HTML, on one line."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(shown(text).split()))


def _block(text: str) -> str:
    """Text as a fenced block, which no text can end before its end."""
    text = shown(text)
    if len(text) > _SHOWN_CHARACTERS:
        text = text[:_SHOWN_CHARACTERS] + f"\n[... {len(text) - _SHOWN_CHARACTERS:,} more characters]"
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
