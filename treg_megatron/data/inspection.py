"""Statistics of a file of preference pairs."""

import math
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from treg_megatron.data.labelled_pairs import SIDES
from treg_megatron.data.pairs import (
    EQUAL_SCORES,
    Pair,
    PairReader,
    Reading,
    Repeats,
    conversation_text,
    identity_hashes,
    no_pairs,
    none_left,
    without_signal,
)
from treg_megatron.data.records import work_on_rows
from treg_megatron.data.responses import prompt_answers, scored_response
from treg_megatron.data.symptoms import Signs, Symptoms, signs_of
from treg_megatron.errors import UserError
from treg_megatron.formats.pair_format import NoPreference
from treg_megatron.tokenizer.chat import ChatTokenizer
from treg_megatron.utils.parallel import usable_cores
from treg_megatron.utils.terminal import without_control_bytes

_SHOWN_ROWS = 5
_QUANTILES = (0.0, 0.5, 0.95, 1.0)
_COUNTED = ("scored", "chosen_scored_lower", "contradicting", "cut_off", "spelled_end")
_BARS, _MOST_BARS = 24, 40  # of a histogram; more than the first only for values of which each has one
_LARGEST = 1e300  # of a difference of scores that a histogram shows
#: What the lengths in a report are of.
LENGTHS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "longest": "prompt and longer answer"}
_LETTER = re.compile(r"[^\W\d_]")


def inspect_pairs(
    source: str | Path,
    reading: Reading | None = None,
    tokenizer: ChatTokenizer | None = None,
    max_length: int | None = None,
    examples: int = 0,
    workers: int | None = None,
) -> dict[str, Any]:
    """Read all pairs of ``source`` and compute their statistics.

    Args:
        reading: how records are read; None: the format is recognised.
        tokenizer: lengths are measured in its tokens; None: in characters.
        max_length: maximum length of prompt + response, in the same unit, for ``too_long``.
        examples: the first pairs to return as texts.
        workers: processes that read a large source; the report does not depend on them. None: one per core.

    Returns:
        format, pairs, drops (records by reason), notes (scores and ids read as none), unusable (number of records),
        first_unusable (messages), turns (pairs by number of turns), system (pairs with a system message), weights
        (number of pairs that have one, and the least and greatest; absent without),
        repeated_prompts, the counts and warnings of :class:`~treg_megatron.data.symptoms.Symptoms`, chosen_longer
        (share of pairs, None if there are too few), unit, lengths (minimum, median, 95th percentile and maximum of
        prompt, chosen, rejected, longest), too_long (pairs), histograms (by name: low, high, counts, median, and its
        place from 0 to 1), scripts (chosen answers by the writing system of their first letter), examples (the first
        pairs as tokens decode).

    Raises:
        UserError: the file has no usable pair, or its format is not recognised.
    """
    examiner, survey = _Examiner(reading or Reading(), tokenizer), _Survey(examples)
    workers = usable_cores() if workers is None else workers
    examiner.shows = examples > 0
    for before, findings in work_on_rows(
        examiner, source, workers, alone=lambda: examiner.reader.format is None or examiner.shows
    ):
        survey.add(before, findings)
        examiner.shows = len(survey.examples) < examples
    if survey.empty:
        raise no_pairs(source)
    if not survey.pairs and survey.unusable:
        raise UserError(f"{source}: no row can be used; the first is {survey.unusable[0]}")
    if not survey.pairs:
        raise UserError(none_left(source, survey.drops))
    format = examiner.reader.format
    assert format is not None
    return {"format": format.name, **survey.report("tokens" if tokenizer else "characters", max_length)}


class _Facts(NamedTuple):
    """What the report needs to know of a pair, as integers.

    ``id_hash`` and ``pair_hash`` are those of :func:`~treg_megatron.data.pairs.identity_hashes`; prompt, chosen and
    rejected are sizes, -1 if the tokenizer cannot take the pair.
    """

    number: int
    id_hash: int
    pair_hash: int
    turns: int
    system: int
    prompt: int
    chosen: int
    rejected: int


class _Findings(NamedTuple):
    """What a batch of records holds, small enough to be sent to another process.

    Attributes:
        facts: int64 [pairs, fields of _Facts].
        signs: int64 [pairs, fields of Signs].
        margins: float64 [pairs], score of chosen minus score of rejected; NaN without.
        weights: float64 [pairs], weight of the pair; NaN without.
        names: each pair's id, and the writing system of its chosen answer.
        refusals: by number of the record, why it cannot be used.
        texts: by number of the record, prompt, chosen and rejected as they may be shown.
        drops: records without a training signal, by reason.
        notes: scores and ids read as none.
    """

    facts: np.ndarray
    signs: np.ndarray
    margins: np.ndarray
    weights: np.ndarray
    names: list[tuple[str, str]]
    refusals: dict[int, str]
    texts: dict[int, Sequence[str]]
    drops: Counter[str]
    notes: Counter[str]


class _Examiner:
    """Finds out of records what the report needs to know.

    Attributes:
        shows: whether pairs are returned as texts, too.
    """

    def __init__(self, reading: Reading, tokenizer: ChatTokenizer | None):
        self.reader, self._tokenizer = PairReader(reading), tokenizer
        self.shows = False

    def __call__(self, records: Sequence[tuple[int, Any]]) -> _Findings:
        facts: list[_Facts] = []
        signs: list[Signs] = []
        margins: list[float] = []
        weights: list[float] = []
        names: list[tuple[str, str]] = []
        refusals: dict[int, str] = {}
        texts: dict[int, Sequence[str]] = {}
        drops: Counter[str] = Counter()
        notes = self.reader.notes = Counter()
        for number, record in records:
            try:
                pair = self.reader.pair(number, record)
            except NoPreference:
                drops[EQUAL_SCORES] += 1
                continue
            except ValueError as error:
                refusals[number] = str(error)
                continue
            if reason := without_signal(pair):
                drops[reason] += 1
                continue
            sizes: Sequence[int] = (-1, -1, -1)
            try:
                sizes, texts[number] = self._sizes_and_texts(pair)
            except UserError as error:
                refusals[number] = str(error)
            system = pair.messages[0].role == "system"
            facts.append(_Facts(number, *identity_hashes(pair), len(pair.messages), system, *sizes))
            signs.append(signs_of(pair))
            names.append((pair.pair_id, _script(pair.chosen)))
            scores = (pair.chosen_score, pair.rejected_score)
            margins.append(math.nan if scores[0] is None or scores[1] is None else scores[0] - scores[1])
            weights.append(math.nan if pair.pair_weight is None else pair.pair_weight)
        return _Findings(
            np.array(facts, dtype=np.int64).reshape(-1, len(_Facts._fields)),
            np.array(signs, dtype=np.int64).reshape(-1, len(Signs._fields)),
            np.array(margins, dtype=np.float64),
            np.array(weights, dtype=np.float64),
            names,
            refusals,
            texts if self.shows else {},
            drops,
            notes,
        )

    def _sizes_and_texts(self, pair: Pair) -> tuple[Sequence[int], Sequence[str]]:
        """Of prompt, chosen and rejected: sizes in tokens, or in characters without a tokenizer, and texts."""
        if self._tokenizer is None:
            sizes = (sum(len(m.content) for m in pair.messages), len(pair.chosen), len(pair.rejected))
            return sizes, (conversation_text(pair.messages), pair.chosen, pair.rejected) if self.shows else ()
        ids = [self._tokenizer.encode_prompt(pair.messages, pair.tools, prompt_answers(pair))]
        ids += [scored_response(pair, side, self._tokenizer)[0] for side in SIDES]
        return tuple(map(len, ids)), tuple(map(self._tokenizer.decode, ids)) if self.shows else ()


class _Survey:
    """The report in the making."""

    def __init__(self, examples: int):
        self.empty, self.pairs, self.system = True, 0, 0
        self.drops: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.unusable: list[str] = []
        self.turns: Counter[int] = Counter()
        self.scripts: Counter[str] = Counter()
        self.symptoms, self._repeats = Symptoms(), Repeats()
        self.margins, self.weights, self.sizes = array("d"), array("d"), array("q")
        self.examples: list[dict[str, Any]] = []
        self._shown = examples

    def add(self, before: int, findings: _Findings) -> None:
        """Add what was found in a batch of records, whose numbers count from ``before``."""
        self.empty = False
        self.drops += findings.drops
        self.notes += findings.notes
        counting = self._counting(findings)
        self.unusable += [f"row {before + number}: {why}" for number, why in sorted(findings.refusals.items())]
        facts = findings.facts[counting]
        self.pairs += len(facts)
        _, _, _, turns, system, *_ = facts.T
        self.turns.update(turns.tolist())
        self.system += int(system.sum())
        self.symptoms.add(findings.signs[counting])
        margins = findings.margins[counting]
        self.margins.frombytes(margins[np.abs(margins) < _LARGEST].tobytes())
        weights = findings.weights[counting]
        self.weights.frombytes(weights[~np.isnan(weights)].tobytes())
        self.sizes.frombytes(facts[:, -3:].tobytes())
        self.scripts.update(findings.names[i][1] for i in counting)
        for i in counting[: self._shown - len(self.examples)]:
            number = int(findings.facts[i, 0])
            texts = dict(zip(("prompt", "chosen", "rejected"), findings.texts[number], strict=True))
            self.examples.append({"pair_id": findings.names[i][0], "row": before + number, **texts})

    def _counting(self, findings: _Findings) -> list[int]:
        """The pairs of a batch that count; the others are dropped, or come to its refusals."""
        numbers, id_hashes, pair_hashes, *_ = findings.facts.T.tolist()
        if self._repeats.are_new(id_hashes, pair_hashes):
            return [i for i, number in enumerate(numbers) if number not in findings.refusals]
        counting = []
        for i, number in enumerate(numbers):
            try:
                reason = self._repeats.reason(findings.names[i][0], id_hashes[i], pair_hashes[i])
            except ValueError as error:
                findings.refusals[number] = str(error)
                continue
            if reason:
                self.drops[reason] += 1
                findings.refusals.pop(number, None)
            elif number not in findings.refusals:
                counting.append(i)
        return counting

    def report(self, unit: str, max_length: int | None) -> dict[str, Any]:
        """The report, but for the format."""
        prompt, chosen, rejected = np.frombuffer(self.sizes, dtype=np.int64).reshape(-1, 3).T
        longest = prompt + np.maximum(chosen, rejected)
        lengths = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "longest": longest}
        return {
            "pairs": self.pairs,
            "drops": dict(sorted(self.drops.items())),
            "notes": dict(sorted(self.notes.items())),
            "unusable": len(self.unusable),
            "first_unusable": self.unusable[:_SHOWN_ROWS],
            "turns": dict(sorted(self.turns.items())),
            "system": self.system,
            **({"weights": [len(self.weights), min(self.weights), max(self.weights)]} if self.weights else {}),
            "repeated_prompts": self.symptoms.repeated_prompts,
            **{name: getattr(self.symptoms, name) for name in _COUNTED},
            "chosen_longer": self.symptoms.longer_share,
            "warnings": self.symptoms.warnings(),
            "unit": unit,
            "lengths": {key: _quantiles(values) for key, values in lengths.items()},
            "too_long": int((lengths["longest"] > max_length).sum()) if max_length else None,
            "histograms": {
                **{f"{unit} of {LENGTHS[key]}": _histogram(values) for key, values in lengths.items()},
                **(
                    {"score of chosen minus score of rejected": _histogram(np.asarray(self.margins))}
                    if self.margins
                    else {}
                ),
            },
            "scripts": dict(self.scripts.most_common()),
            "examples": self.examples,
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
    if "weights" in report:
        count, least, greatest = report["weights"]
        lines.append(f"with a weight: {count}, from {least:g} to {greatest:g}; the others weigh 1")
    lines += [
        f"{report['unit']} of {LENGTHS[key]}: minimum {low}, median {middle}, 95th percentile {high}, maximum {top}"
        for key, (low, middle, high, top) in report["lengths"].items()
    ]
    if report["too_long"] is not None:
        lines.append(f"longer than the maximum length: {report['too_long']}")
    return lines


def _script(text: str) -> str:
    """Writing system of a text's first letter, as Unicode names it: LATIN, CJK, CYRILLIC, ..."""
    letter = _LETTER.search(text)
    return unicodedata.name(letter[0], "UNKNOWN").partition(" ")[0] if letter else "NO LETTERS"


def _histogram(values: np.ndarray) -> dict[str, Any]:
    """Counts of values in equal parts of their range; few equidistant values have one part each."""
    low, high = values.min().item(), values.max().item()
    distinct = np.unique(values)
    gap = np.diff(distinct).min() if len(distinct) > 1 else 1
    if (high - low) / gap < _MOST_BARS:
        at = np.rint((values - low) / gap) + 0.5
        bars = int(at.max() + 0.5)
    else:
        at, bars = (values - low) / ((high - low) / _BARS), _BARS
    counts = np.bincount(np.minimum(at.astype(np.int64), bars - 1), minlength=bars).tolist()
    middle = np.argsort(values, kind="stable")[round(0.5 * (len(values) - 1))]
    return {
        "low": low,
        "high": high,
        "counts": counts,
        "median": values[middle].item(),
        "median_at": at[middle].item() / bars,
    }


def _quantiles(values: np.ndarray) -> list[int]:
    ordered = np.sort(values)
    return [int(ordered[round(q * (len(ordered) - 1))]) for q in _QUANTILES]
