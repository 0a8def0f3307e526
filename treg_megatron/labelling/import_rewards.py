"""Import of user-supplied token rewards: a value for each token, piece of text or span of characters of a response.

Each record is a preference pair in any supported format, with one of the following for chosen and for rejected:

    SIDE_token_rewards  with  SIDE_token_ids      one value per id of our tokenizer; the end-of-turn id is optional
    SIDE_token_rewards  with  SIDE_token_texts    one value per text; the texts, concatenated, are the response
    SIDE_spans                                    [first character, one after the last, value], ...; 0 elsewhere

Values lie in [-0.5, 0.5], or label.squash names a function that brings them there, applied to those of one response
as they are given. Texts and spans are mapped to our tokens by character offsets. One text or span may cover
several of our tokens, which all get its value, but must not cover only part of a token. White space at a token's edge
belongs to no span, since tokens own the space before a word: the span of a word covers the word's token. The
end-of-turn token gets 0 unless it is among the given ids.
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from treg_megatron.config.schema import LabelSection
from treg_megatron.data.labelled_pairs import SIDES, LabelledPair, write_shard
from treg_megatron.data.pairs import IDENTICAL_RESPONSES, Pair, Reading, read_pairs, read_pairs_and_rows
from treg_megatron.data.records import source_identity
from treg_megatron.data.responses import (
    PROMPT_FILLS_CONTEXT,
    TOO_LONG,
    labelled_pair,
    prompt_answers,
    require_text,
    response_ids,
)
from treg_megatron.errors import UserError
from treg_megatron.labelling.scoring import Scorer, sequences_of
from treg_megatron.labelling.squash import squashed
from treg_megatron.tokenizer.chat import ChatTokenizer, load_tokenizer
from treg_megatron.utils.lock import Lock
from treg_megatron.utils.parallel import batches, in_order

AS_GIVEN = "auto"  # of label.squash
_LARGEST = 0.5
_PAIRS_AT_ONCE = 64
_COLUMNS = tuple(f"{side}_{name}" for side in SIDES for name in ("token_rewards", "token_ids", "token_texts", "spans"))


def import_token_rewards(section: LabelSection, scorer: Scorer | None) -> dict[str, Any]:
    """Convert ``section.pairs`` with token rewards to labelled pairs in the Parquet file ``section.output``.

    Holds at most ``section.shard_pairs`` pairs in memory, whatever the size of the file.

    Args:
        section: the ``label`` settings of the run.
        scorer: computes the reference log-probs. Without one the file has none, which reference-free objectives allow.

    Returns:
        ``file`` (the path written), ``pairs`` (their number), ``drops`` (counts by reason) and ``snapped_spans`` (how
        many texts or spans began or ended in the white space at a token's edge).

    Raises:
        UserError: a record has no rewards, or rewards that do not line up with its tokens; or no pair fits.
    """
    tokenizer = load_tokenizer(section.model, section.template or "")
    drops: Counter[str] = Counter()
    counts: dict[str, Any] = {"drops": drops, "snapped_spans": 0}  # filled in while the pairs are written
    labelled = _fitting(section, tokenizer, drops, counts)
    if scorer is not None:
        # Read everything once before the first forward pass: a broken record must not surface after hours of scoring.
        for _ in _fitting(section, tokenizer, Counter(), {"snapped_spans": 0}):
            pass
        labelled = _with_reference(labelled, scorer, section.shard_pairs)
    first = next(labelled, None)
    if first is None:
        raise UserError(f"{section.pairs}: no pair is left ({', '.join(drops)})")
    run = {
        "pairs": source_identity(section.pairs),
        "token_rewards": "own",
        "tokenizer": tokenizer.identity,
        "reference": {"model": Path(section.model).name, "dtype": section.dtype} if scorer else None,
        "max_length": section.max_length,
        **({} if section.squash == AS_GIVEN else {"squash": section.squash}),
    }
    counts["run"] = run
    output = Path(section.output)
    file = output if output.suffix == ".parquet" else output.with_name(output.name + ".parquet")
    weighted = any(pair.pair_weight is not None for pair in read_pairs(section.pairs, reading=Reading.of(section)))
    with Lock(file):
        pairs = write_shard(file, itertools.chain([first], labelled), counts, weighted)
    return {
        "file": str(file),
        "pairs": pairs,
        "drops": dict(sorted(drops.items())),
        "snapped_spans": counts["snapped_spans"],
    }


def _fitting(
    section: LabelSection, tokenizer: ChatTokenizer, drops: Counter[str], counts: dict[str, Any]
) -> Iterator[LabelledPair]:
    for pair, row in read_pairs_and_rows(section.pairs, drops, Reading.of(section)):
        try:
            labelled, reason, snapped = _labelled(pair, row, tokenizer, section.max_length, section.squash)
        except (ValueError, UserError) as error:
            raise UserError(f"{section.pairs}, pair {pair.pair_id}: {error}") from None
        if labelled is None:
            drops[reason] += 1
        else:
            counts["snapped_spans"] += snapped
            yield labelled


def _with_reference(pairs: Iterator[LabelledPair], scorer: Scorer, at_once: int) -> Iterator[LabelledPair]:
    for batch in batches(pairs, at_once):
        logps = iter(scorer.score([sequence for pair in batch for sequence in sequences_of(pair)]))
        for pair in batch:
            yield dataclasses.replace(pair, **{f"{side}_ref_logprobs": next(logps) for side in SIDES})


def labelled_from_text(
    source: str | Path, tokenizer: ChatTokenizer, workers: int, counts: dict[str, Any]
) -> Iterator[LabelledPair]:
    """Labelled pairs without reference log-probs from a text file of pairs with token rewards, in file order.

    ``workers`` processes tokenise. Only a few batches of pairs are in memory at a time, whatever the size of the file.
    ``counts["snapped_spans"]`` is counted up meanwhile.

    Raises:
        UserError: as for :func:`import_token_rewards`.
    """
    counts["snapped_spans"] = 0
    pairs = own_columns(read_pairs_and_rows(source))
    work = functools.partial(_labelled_batch, source, tokenizer)
    for labelled, snapped in in_order(work, batches(pairs, _PAIRS_AT_ONCE), workers):
        counts["snapped_spans"] += snapped
        yield from labelled


def own_columns(pairs: Iterator[tuple[Pair, dict]]) -> Iterator[tuple[Pair, dict]]:
    """Pairs with those columns of their records that this module reads, which may be sent to other processes."""
    for pair, row in pairs:
        yield pair, {name: row[name] for name in _COLUMNS if name in row}


def _labelled_batch(
    source: str | Path, tokenizer: ChatTokenizer, batch: list[tuple[Pair, dict]]
) -> tuple[list[LabelledPair], int]:
    labelled, snapped = [], 0
    for pair, row in batch:
        try:
            one, _, more = _labelled(pair, row, tokenizer, sys.maxsize)
        except (ValueError, UserError) as error:
            raise UserError(f"{source}, pair {pair.pair_id}: {error}") from None
        if one is not None:
            labelled.append(one)
            snapped += more
    return labelled, snapped


def response_rewards(
    tokenizer: ChatTokenizer, pair: Pair, side: str, row: dict, squash: str = AS_GIVEN
) -> tuple[list[int], np.ndarray, int]:
    """Token ids of one side's response, a list of n; their rewards, [n] fp32; and how many spans were snapped.

    Args:
        squash: function of :mod:`treg_megatron.labelling.squash` for the values, or :data:`AS_GIVEN`.

    Raises:
        ValueError: the rewards are missing, out of range, or do not line up with the ids.
    """
    require_text(pair, side)
    response, snapped = getattr(pair, side), 0
    values, given, texts = (row.get(f"{side}_{name}") for name in ("token_rewards", "token_ids", "token_texts"))
    ids, spans = (
        (response_ids(pair, side, tokenizer), None)
        if given is not None
        else tokenizer.encode_response_with_spans(pair.messages, response, pair.tools, prompt_answers(pair))
    )
    if given is not None:
        rewards = _by_id(side, given, _squashed(_numbers(values, f"{side}_token_rewards"), squash), ids)
    elif texts is not None:
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{side}_token_texts must be a list of texts")
        if "".join(texts) != response:
            raise ValueError(f"{side}_token_texts, concatenated, are not the {side} response")
        values = _squashed(_numbers(values, f"{side}_token_rewards"), squash)
        if len(values) != len(texts):
            raise ValueError(f"{side}_token_rewards has {len(values)} values for {len(texts)} texts")
        ends = np.cumsum([len(text) for text in texts]).tolist()
        rewards, snapped = _by_span(side, list(zip([0, *ends], ends, values, strict=False)), spans, response)
    elif row.get(f"{side}_spans") is not None:
        valued = _spans(row[f"{side}_spans"], f"{side}_spans", len(response))
        rewards_of_spans = _squashed([value for *_, value in valued], squash)
        valued = [(first, last, value) for (first, last, _), value in zip(valued, rewards_of_spans, strict=True)]
        rewards, snapped = _by_span(side, valued, spans, response)
    else:
        raise ValueError(
            f"{side} has no token rewards: give {side}_token_rewards with {side}_token_ids or "
            f"{side}_token_texts, or {side}_spans"
        )
    rewards = np.asarray(rewards, dtype=np.float32)
    if (wrong := ~(np.abs(rewards) <= _LARGEST)).any():
        raise ValueError(
            f"{side} has a token reward of {rewards[wrong][0]:g}, outside [-0.5, 0.5]: name a function that brings "
            "such values there, as in label.squash=sigmoid of import-rewards"
        )
    return ids, rewards, snapped


def _labelled(
    pair: Pair, row: dict, tokenizer: ChatTokenizer, max_length: int, squash: str = AS_GIVEN
) -> tuple[LabelledPair | None, str, int]:
    """The labelled pair, or None and the reason for dropping it; and how many spans were snapped."""
    prompt, snapped = tokenizer.encode_prompt(pair.messages, pair.tools, prompt_answers(pair)), 0
    if len(prompt) >= max_length:
        return None, PROMPT_FILLS_CONTEXT, 0
    columns: dict[str, Any] = {}
    for side in SIDES:
        ids, rewards, more = response_rewards(tokenizer, pair, side, row, squash)
        if len(prompt) + len(ids) > max_length:
            return None, TOO_LONG, 0
        snapped += more
        columns[f"{side}_tokens"] = np.array([*prompt, *ids], dtype=np.int32)
        columns[f"{side}_token_rewards"] = rewards
    if np.array_equal(columns["chosen_tokens"], columns["rejected_tokens"]):
        return None, IDENTICAL_RESPONSES, 0
    return labelled_pair(pair, columns), "", snapped


def _squashed(values: list[float], squash: str) -> list[float]:
    return values if squash == AS_GIVEN or not values else squashed(np.array(values), squash).tolist()


def _by_id(side: str, given: Any, values: list[float], ids: list[int]) -> list[float]:
    if given not in (ids, ids[:-1]):
        at = (
            next((i for i, (a, b) in enumerate(zip(given, ids, strict=False)) if a != b), min(len(given), len(ids)))
            if isinstance(given, list)
            else 0
        )
        raise ValueError(
            f"{side}_token_ids are not the ids of the {side} response: they differ at token {at} of {len(ids)}"
        )
    if len(values) != len(given):
        raise ValueError(f"{side}_token_rewards has {len(values)} values for {len(given)} ids")
    return [*values, 0.0][: len(ids)]


def _by_span(
    side: str, valued: list[tuple[int, int, float]], spans: np.ndarray, response: str
) -> tuple[np.ndarray, int]:
    """The value of each token, and how many spans begin or end in the white space at a token's edge."""
    beyond = (len(response), sys.maxsize, 0.0)
    firsts, lasts, values = (np.array(column) for column in zip(*valued, beyond, strict=True))
    starts, ends = spans.T
    at, inside, before = _covering(firsts, lasts, starts, ends)
    rewards, snapped = np.where(inside, values[at], 0.0), set()
    for token in np.flatnonzero(~(inside | before)):
        start, end = spans[token]
        words = response[start:end].strip()
        core = start + response[start:end].index(words)
        theirs, covered, beside = _covering(firsts, lasts, core, core + len(words))
        if words and not (covered or beside):
            raise ValueError(
                f"{side}: the rewards do not line up with our tokens: {response[start:end]!r} (characters "
                f"{start} to {end}) is one token, but the reward for characters {firsts[theirs]} to "
                f"{lasts[theirs]} covers only part of it"
            )
        rewards[token] = values[theirs] if words and covered else 0.0
        snapped |= set(np.flatnonzero((firsts[:-1] < end) & (lasts[:-1] > start)).tolist())
    return np.append(rewards, 0.0), len(snapped)


def _covering(firsts: np.ndarray, lasts: np.ndarray, starts: Any, ends: Any) -> tuple[Any, Any, Any]:
    """The first given span that ends after a token begins; whether it covers the token; whether it only follows."""
    at = np.searchsorted(lasts, starts, side="right")
    return at, (firsts[at] <= starts) & (ends <= lasts[at]), ends <= firsts[at]


def _spans(given: Any, name: str, length: int) -> list[tuple[int, int, float]]:
    spans, reached = [], 0
    if not isinstance(given, list):
        raise ValueError(f"{name} must be a list of [first character, one after the last, value]")
    for span in given:
        if isinstance(span, dict):
            span = [span.get("start"), span.get("end"), span.get("reward")]
        if not isinstance(span, list) or len(span) != 3:
            raise ValueError(
                f"{name} holds {str(span)[:60]}, which is not [first character, one after the last, value]"
            )
        start, end, value = *_numbers(span[:2], name), *_numbers(span[2:], name)
        if not (start == int(start) and end == int(end) and reached <= start < end <= length):
            raise ValueError(
                f"{name} holds {start:g} to {end:g}: spans must be in order, must not overlap, and must lie within "
                f"the {length} characters of the response"
            )
        reached = int(end)
        spans.append((int(start), reached, value))
    return spans


def _numbers(values: Any, name: str) -> list[float]:
    if not isinstance(values, list) or not all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values
    ):
        raise ValueError(f"{name} must be a list of finite numbers")
    return list(values)
