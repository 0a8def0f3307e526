"""Statistics of a file of preference pairs."""

from collections import Counter
from pathlib import Path
from typing import Any

from treg_megatron.data.pairs import AUTO, Pair, read_pairs_and_rows, recognise
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.chat import ChatTokenizer

_SHOWN_ROWS = 5
_QUANTILES = (0.0, 0.5, 0.95, 1.0)


def inspect_pairs(
    source: str | Path, format: str = AUTO, tokenizer: ChatTokenizer | None = None, max_length: int | None = None
) -> dict[str, Any]:
    """Read all pairs of ``source`` and compute their statistics.

    Args:
        format: name of a format, or ``auto``.
        tokenizer: lengths are measured in its tokens; None: in characters.
        max_length: maximum length of prompt + response, in the same unit, for ``too_long``.

    Returns:
        format, pairs, drops (records by reason), unusable (number of records), first_unusable (messages), turns (pairs
        by number of turns), system (pairs with a system message), repeated_prompts, scored, chosen_scored_lower, unit,
        lengths (minimum, median, 95th percentile and maximum of prompt, chosen, rejected, longest), too_long (pairs).

    Raises:
        UserError: the file has no usable pair, or its format is not recognised.
    """
    drops: Counter[str] = Counter()
    unusable: list[str] = []
    turns: Counter[int] = Counter()
    prompts: set[int] = set()
    lengths: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": [], "longest": []}
    name, pairs, system, scored, inverted = format, 0, 0, 0, 0
    for pair, row in read_pairs_and_rows(source, drops, format, unusable.append):
        if pairs == 0 and format == AUTO:
            name = recognise(row).name
        pairs += 1
        turns[len(pair.messages)] += 1
        system += pair.messages[0].role == "system"
        prompts.add(hash(pair.messages))
        if pair.chosen_score is not None and pair.rejected_score is not None:
            scored += 1
            inverted += pair.chosen_score < pair.rejected_score
        try:
            prompt, chosen, rejected = _lengths(pair, tokenizer)
        except UserError as error:
            unusable.append(f"pair {pair.pair_id}: {error}")
            continue
        for key, value in zip(lengths, (prompt, chosen, rejected, prompt + max(chosen, rejected)), strict=True):
            lengths[key].append(value)
    if not pairs and unusable:
        raise UserError(f"{source}: no row can be used; the first is {unusable[0]}")
    return {
        "format": name,
        "pairs": pairs,
        "drops": dict(drops),
        "unusable": len(unusable),
        "first_unusable": unusable[:_SHOWN_ROWS],
        "turns": dict(sorted(turns.items())),
        "system": system,
        "repeated_prompts": pairs - len(prompts),
        "scored": scored,
        "chosen_scored_lower": inverted,
        "unit": "tokens" if tokenizer else "characters",
        "lengths": {key: _quantiles(values) for key, values in lengths.items() if values},
        "too_long": sum(value > max_length for value in lengths["longest"]) if max_length else None,
    }


def as_text(report: dict[str, Any]) -> str:
    """The report of :func:`inspect_pairs` as text, one statistic per line."""
    lines = [f"{report['pairs']} pairs, read as {report['format']}"]
    lines += [f"left out: {count} {reason}" for reason, count in sorted(report["drops"].items())]
    lines += [f"cannot be used: {report['unusable']} rows"] * bool(report["unusable"])
    lines += [f"    {message}" for message in report["first_unusable"]]
    lines.append("turns before the answer: " + ", ".join(f"{n} in {count}" for n, count in report["turns"].items()))
    lines.append(f"with a system message: {report['system']}; repeated prompts: {report['repeated_prompts']}")
    if report["scored"]:
        lines.append(f"scored: {report['scored']}, chosen has the lower score in {report['chosen_scored_lower']}")
    lines += [
        f"{report['unit']} of {key}: minimum {low}, median {middle}, 95th percentile {high}, maximum {top}"
        for key, (low, middle, high, top) in report["lengths"].items()
    ]
    if report["too_long"] is not None:
        lines.append(f"longer than the maximum length: {report['too_long']}")
    return "\n".join(lines)


def _lengths(pair: Pair, tokenizer: ChatTokenizer | None) -> tuple[int, int, int]:
    if tokenizer is None:
        return sum(len(m.content) for m in pair.messages), len(pair.chosen), len(pair.rejected)
    chosen, rejected = (len(tokenizer.encode_response(pair.messages, text)) for text in (pair.chosen, pair.rejected))
    return len(tokenizer.encode_prompt(pair.messages)), chosen, rejected


def _quantiles(values: list[int]) -> list[int]:
    values = sorted(values)
    return [values[round(q * (len(values) - 1))] for q in _QUANTILES]
