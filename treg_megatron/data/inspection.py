"""Statistics of a file of preference pairs."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treg_megatron.data.pairs import Pair, Reading, conversation_text, none_left, read_pairs_and_rows
from treg_megatron.errors import UserError
from treg_megatron.formats import recognise
from treg_megatron.formats.templated import spelled_end
from treg_megatron.tokenizer.chat import ChatTokenizer

_SHOWN_ROWS = 5
_QUANTILES = (0.0, 0.5, 0.95, 1.0)
_LENGTH_BIAS = 0.9
_ENOUGH_FOR_A_SHARE = 20  # pairs; fewer say nothing about a bias
_LONG_ANSWER = 200  # characters; a shorter one may well end without punctuation
_MID_SENTENCE = re.compile(r"[\w,;]\Z")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


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
        repeated_prompts, scored, chosen_scored_lower, contradicting (pairs whose preference another one reverses),
        chosen_longer (share of pairs), cut_off (answers that seem to stop in mid-sentence), spelled_end (answers that
        end with a spelled-out end-of-turn token), unit, lengths (minimum, median, 95th percentile and maximum of
        prompt, chosen, rejected, longest), too_long (pairs), examples (the first pairs as tokens decode).

    Raises:
        UserError: the file has no usable pair, or its format is not recognised.
    """
    drops: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    unusable: list[str] = []
    turns: Counter[int] = Counter()
    prompts: set[int] = set()
    preferences: set[tuple[int, int, int]] = set()
    lengths: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": [], "longest": []}
    counts: Counter[str] = Counter()
    shown: list[dict[str, str]] = []
    reading = reading or Reading()
    format, pairs, longer = reading.chosen_format(), 0, 0
    for pair, row in read_pairs_and_rows(source, drops, reading, unusable.append, notes):
        format = format or recognise(row)
        try:
            texts = _texts(pair, tokenizer)
        except UserError as error:
            unusable.append(f"row {pair.row}: {error}")
            continue
        pairs += 1
        turns[len(pair.messages)] += 1
        counts["system"] += pair.messages[0].role == "system"
        prompt, chosen, rejected = hash((pair.messages, pair.tools)), hash(pair.chosen), hash(pair.rejected)
        prompts.add(prompt)
        counts["contradicting"] += (prompt, rejected, chosen) in preferences
        preferences.add((prompt, chosen, rejected))
        if pair.chosen_score is not None and pair.rejected_score is not None:
            counts["scored"] += 1
            counts["chosen_scored_lower"] += pair.chosen_score < pair.rejected_score
        for answer in (pair.chosen, pair.rejected):
            counts["cut_off"] += len(answer) >= _LONG_ANSWER and _MID_SENTENCE.search(answer) is not None
            counts["spelled_end"] += bool(spelled_end(answer))
        sizes = [
            sum(len(m.content) for m in pair.messages) if tokenizer is None else len(texts[0]),
            *map(len, texts[1:]),
        ]
        longer += sizes[1] > sizes[2]
        for key, value in zip(lengths, (*sizes, sizes[0] + max(sizes[1:])), strict=True):
            lengths[key].append(value)
        if len(shown) < examples:
            shown.append(_example(pair, texts, tokenizer))
    if not pairs and unusable:
        raise UserError(f"{source}: no row can be used; the first is {unusable[0]}")
    if not pairs:
        raise UserError(none_left(source, drops))
    return {
        "format": format.name if format else reading.format,
        "pairs": pairs,
        "drops": dict(drops),
        "notes": dict(notes),
        "unusable": len(unusable),
        "first_unusable": unusable[:_SHOWN_ROWS],
        "turns": dict(sorted(turns.items())),
        "system": counts["system"],
        "repeated_prompts": pairs - len(prompts),
        "scored": counts["scored"],
        "chosen_scored_lower": counts["chosen_scored_lower"],
        "contradicting": counts["contradicting"],
        "chosen_longer": round(longer / pairs, 4) if pairs else None,
        "cut_off": counts["cut_off"],
        "spelled_end": counts["spelled_end"],
        "unit": "tokens" if tokenizer else "characters",
        "lengths": {key: _quantiles(values) for key, values in lengths.items() if values},
        "too_long": sum(value > max_length for value in lengths["longest"]) if max_length else None,
        "examples": shown,
    }


def warnings_of(report: dict[str, Any]) -> list[str]:
    """What in a report of :func:`inspect_pairs` speaks of a fault in the data."""
    pairs = report["pairs"]
    warnings = []
    if report["contradicting"]:
        warnings.append(f"{report['contradicting']} pairs prefer what another pair with the same prompt rejects")
    if pairs >= _ENOUGH_FOR_A_SHARE and report["chosen_longer"] >= _LENGTH_BIAS:
        warnings.append(
            f"chosen is longer than rejected in {report['chosen_longer']:.0%} of the pairs: a model may learn length"
        )
    if report["chosen_scored_lower"]:
        warnings.append(f"chosen has the lower score in {report['chosen_scored_lower']} pairs")
    if report["cut_off"] > pairs * 2 * 0.1:
        warnings.append(f"{report['cut_off']} answers seem to be cut off: they end in mid-sentence")
    if report["spelled_end"]:
        warnings.append(f"{report['spelled_end']} answers end with an end-of-turn token spelled out")
    return warnings


def require_usable(source: str | Path, report: dict[str, Any]) -> None:
    """Refuse a source that labelling would refuse, in the same words.

    Raises:
        UserError: a row cannot be used.
    """
    if report["unusable"]:
        raise UserError(f"{source} {report['first_unusable'][0]}")


def as_text(report: dict[str, Any]) -> str:
    """The report of :func:`inspect_pairs` as text, one statistic per line."""
    lines = [f"{report['pairs']} pairs, read as {report['format']}"]
    lines += [f"left out: {count} {reason}" for reason, count in sorted(report["drops"].items())]
    lines += [f"{count} times: {reason}" for reason, count in sorted(report["notes"].items())]
    lines += [f"cannot be used: {report['unusable']} rows"] * bool(report["unusable"])
    lines += [f"    {message}" for message in report["first_unusable"]]
    if report["turns"]:
        lines.append("turns before the answer: " + ", ".join(f"{n} in {count}" for n, count in report["turns"].items()))
        lines.append(f"with a system message: {report['system']}; repeated prompts: {report['repeated_prompts']}")
    if report["pairs"] >= _ENOUGH_FOR_A_SHARE:
        lines.append(f"chosen is the longer answer in {report['chosen_longer']:.0%}")
    if report["scored"]:
        lines.append(f"scored: {report['scored']}, chosen has the lower score in {report['chosen_scored_lower']}")
    lines += [
        f"{report['unit']} of {key}: minimum {low}, median {middle}, 95th percentile {high}, maximum {top}"
        for key, (low, middle, high, top) in report["lengths"].items()
    ]
    if report["too_long"] is not None:
        lines.append(f"longer than the maximum length: {report['too_long']}")
    lines += [f"warning: {warning}" for warning in warnings_of(report)]
    for example in report["examples"]:
        lines += ["", f"--- pair {example['pair_id']}, row {example['row']}"]
        lines += [f"[{name}] {example[name]}" for name in ("prompt", "chosen", "rejected")]
    return without_control_bytes("\n".join(lines))


def without_control_bytes(text: str) -> str:
    """Text for a terminal: control bytes and marks that turn its direction round are escaped."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def _example(pair: Pair, texts: Sequence[Any], tokenizer: ChatTokenizer | None) -> dict[str, Any]:
    shown = texts if tokenizer is None else [tokenizer.decode(ids) for ids in texts]
    return {"pair_id": pair.pair_id, "row": pair.row, **dict(zip(("prompt", "chosen", "rejected"), shown, strict=True))}


def _texts(pair: Pair, tokenizer: ChatTokenizer | None) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """Prompt, chosen and rejected: token ids, or characters without a tokenizer."""
    if tokenizer is None:
        return conversation_text(pair.messages), pair.chosen, pair.rejected
    chosen, rejected = (tokenizer.encode_response(pair.messages, text) for text in (pair.chosen, pair.rejected))
    return tokenizer.encode_prompt(pair.messages), chosen, rejected


def _quantiles(values: list[int]) -> list[int]:
    values = sorted(values)
    return [values[round(q * (len(values) - 1))] for q in _QUANTILES]
