"""Statistics of a file of preference pairs."""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from treg_megatron.data.labelled_pairs import SIDES
from treg_megatron.data.pairs import Pair, Reading, conversation_text, none_left, read_pairs_and_rows
from treg_megatron.data.responses import prompt_answers, scored_response
from treg_megatron.data.symptoms import Symptoms
from treg_megatron.errors import UserError
from treg_megatron.formats import recognise
from treg_megatron.tokenizer.chat import ChatTokenizer
from treg_megatron.utils.terminal import without_control_bytes

_SHOWN_ROWS = 5
_QUANTILES = (0.0, 0.5, 0.95, 1.0)
_COUNTED = ("scored", "chosen_scored_lower", "contradicting", "cut_off", "spelled_end")
_BARS = 24
_LETTER = re.compile(r"[^\W\d_]")


def inspect_pairs(
    source: str | Path,
    reading: Reading | None = None,
    tokenizer: ChatTokenizer | None = None,
    max_length: int | None = None,
    examples: int = 0,
) -> dict[str, Any]:
    """Read all pairs of ``source`` and compute their statistics.

    Args:
        reading: how records are read; None: the format is recognised.
        tokenizer: lengths are measured in its tokens; None: in characters.
        max_length: maximum length of prompt + response, in the same unit, for ``too_long``.
        examples: the first pairs to return as texts.

    Returns:
        format, pairs, drops (records by reason), notes (scores and ids read as none), unusable (number of records),
        first_unusable (messages), turns (pairs by number of turns), system (pairs with a system message),
        repeated_prompts, the counts and warnings of :class:`~treg_megatron.data.symptoms.Symptoms`, chosen_longer
        (share of pairs, None if there are too few), unit, lengths (minimum, median, 95th percentile and maximum of
        prompt, chosen, rejected, longest), too_long (pairs), histograms (by name: low, high, counts), scripts (chosen
        answers by the writing system of their first letter), examples (the first pairs as tokens decode).

    Raises:
        UserError: the file has no usable pair, or its format is not recognised.
    """
    drops: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    unusable: list[str] = []
    turns: Counter[int] = Counter()
    lengths: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": [], "longest": []}
    symptoms, system = Symptoms(), 0
    shown: list[dict[str, str]] = []
    scripts: Counter[str] = Counter()
    margins: list[float] = []
    reading = reading or Reading()
    format, pairs = reading.chosen_format(), 0
    for pair, row in read_pairs_and_rows(source, drops, reading, unusable.append, notes):
        format = format or recognise(row)
        try:
            texts = _texts(pair, tokenizer, len(shown) < examples)
        except UserError as error:
            unusable.append(f"row {pair.row}: {error}")
            continue
        pairs += 1
        turns[len(pair.messages)] += 1
        system += pair.messages[0].role == "system"
        symptoms.add(pair)
        scripts[_script(pair.chosen)] += 1
        if pair.chosen_score is not None and pair.rejected_score is not None:
            margins.append(pair.chosen_score - pair.rejected_score)
        sizes = [
            sum(len(m.content) for m in pair.messages) if tokenizer is None else len(texts[0]),
            *map(len, texts[1:]),
        ]
        for key, value in zip(lengths, (*sizes, sizes[0] + max(sizes[1:])), strict=True):
            lengths[key].append(value)
        if len(shown) < examples:
            shown.append(_example(pair, texts, tokenizer))
    if not pairs and unusable:
        raise UserError(f"{source}: no row can be used; the first is {unusable[0]}")
    if not pairs:
        raise UserError(none_left(source, drops))
    unit = "tokens" if tokenizer else "characters"
    return {
        "format": format.name if format else reading.format,
        "pairs": pairs,
        "drops": dict(drops),
        "notes": dict(notes),
        "unusable": len(unusable),
        "first_unusable": unusable[:_SHOWN_ROWS],
        "turns": dict(sorted(turns.items())),
        "system": system,
        "repeated_prompts": symptoms.repeated_prompts,
        **{name: symptoms.counts[name] for name in _COUNTED},
        "chosen_longer": symptoms.longer_share,
        "warnings": symptoms.warnings(),
        "unit": unit,
        "lengths": {key: _quantiles(values) for key, values in lengths.items() if values},
        "too_long": sum(value > max_length for value in lengths["longest"]) if max_length else None,
        "histograms": {
            **{f"{unit} of {key}": _histogram(values) for key, values in lengths.items()},
            **({"score of chosen minus score of rejected": _histogram(margins)} if margins else {}),
        },
        "scripts": dict(scripts.most_common()),
        "examples": shown,
    }


def require_usable(source: str | Path, report: dict[str, Any]) -> None:
    """Refuse a source that labelling would refuse, in the same words.

    Raises:
        UserError: a row cannot be used.
    """
    if report["unusable"]:
        raise UserError(f"{source} {report['first_unusable'][0]}")


def as_text(report: Mapping[str, Any]) -> str:
    """The report of :func:`inspect_pairs` as text: statistics, warnings, examples."""
    lines = as_lines(report)
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    for example in report["examples"]:
        lines += ["", f"--- pair {example['pair_id']}, row {example['row']}"]
        lines += [f"[{name}] {example[name]}" for name in ("prompt", "chosen", "rejected")]
    return without_control_bytes("\n".join(lines))


def as_lines(report: Mapping[str, Any]) -> list[str]:
    """The statistics of a report, one per line."""
    lines = [f"{report['pairs']} pairs, read as {report['format']}"]
    lines += [f"left out: {count} {reason}" for reason, count in sorted(report["drops"].items())]
    lines += [f"{count} times: {reason}" for reason, count in sorted(report["notes"].items())]
    lines += [f"cannot be used: {report['unusable']} rows"] * bool(report["unusable"])
    lines += [f"    {message}" for message in report["first_unusable"]]
    if report["turns"]:
        lines.append("turns before the answer: " + ", ".join(f"{n} in {count}" for n, count in report["turns"].items()))
        lines.append(f"with a system message: {report['system']}; repeated prompts: {report['repeated_prompts']}")
    if report["chosen_longer"] is not None:
        lines.append(f"chosen is the longer answer in {report['chosen_longer']:.0%}")
    if report["scored"]:
        lines.append(f"scored: {report['scored']}, chosen has the lower score in {report['chosen_scored_lower']}")
    lines += [
        f"{report['unit']} of {key}: minimum {low}, median {middle}, 95th percentile {high}, maximum {top}"
        for key, (low, middle, high, top) in report["lengths"].items()
    ]
    if report["too_long"] is not None:
        lines.append(f"longer than the maximum length: {report['too_long']}")
    return lines


def _example(pair: Pair, texts: Sequence[Any], tokenizer: ChatTokenizer | None) -> dict[str, Any]:
    shown = texts if tokenizer is None else [tokenizer.decode(ids) for ids in texts]
    return {"pair_id": pair.pair_id, "row": pair.row, **dict(zip(("prompt", "chosen", "rejected"), shown, strict=True))}


def _texts(
    pair: Pair, tokenizer: ChatTokenizer | None, shown: bool
) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Prompt, chosen and rejected: token ids, or characters without a tokenizer (the prompt's only if ``shown``)."""
    if tokenizer is None:
        return conversation_text(pair.messages) if shown else "", pair.chosen, pair.rejected
    prompt = tokenizer.encode_prompt(pair.messages, pair.tools, prompt_answers(pair))
    chosen, rejected = (scored_response(pair, side, tokenizer)[0] for side in SIDES)
    return prompt, chosen, rejected


def _script(text: str) -> str:
    """Writing system of a text's first letter, as Unicode names it: LATIN, CJK, CYRILLIC, ..."""
    letter = _LETTER.search(text)
    return unicodedata.name(letter[0], "UNKNOWN").partition(" ")[0] if letter else "NO LETTERS"


def _histogram(values: Sequence[float]) -> dict[str, Any]:
    """Counts of values in equal parts of their range."""
    low, high = min(values), max(values)
    step = (high - low) / _BARS or 1
    counts = [0] * _BARS
    for value in values:
        counts[min(int((value - low) / step), _BARS - 1)] += 1
    return {"low": low, "high": high, "counts": counts}


def _quantiles(values: list[int]) -> list[int]:
    values = sorted(values)
    return [values[round(q * (len(values) - 1))] for q in _QUANTILES]
