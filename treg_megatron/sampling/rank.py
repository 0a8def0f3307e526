"""The ``rank`` step: turns sampled responses into preference pairs, best against worst response to each prompt.

The paper does not say how to break ties. Here the shortest of the best responses is chosen, and the worst response
closest to it in length is rejected.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from treg_megatron.config.schema import RankSection
from treg_megatron.data.pairs import IDENTICAL_RESPONSES
from treg_megatron.data.records import read_rows
from treg_megatron.errors import UserError
from treg_megatron.sampling.sample import FORMAT, VERSION
from treg_megatron.sampling.scores import RewardModel, finite_scores, imported_function
from treg_megatron.utils.files import atomic_write, read_manifest
from treg_megatron.utils.lock import Lock
from treg_megatron.utils.progress import Progress
from treg_megatron.utils.shard_job import MANIFEST_NAME

EQUAL_SCORES = "all responses have the same score"
TOO_FEW = "fewer than two usable responses"
EMPTY_RESPONSE = "empty response"
TRUNCATED = "truncated response"
REPEATED_RESPONSE = "repeats a response to the same prompt"


class Ranked(NamedTuple):
    """Result of :func:`rank`: number of pairs written, and dropped prompts and responses counted by reason."""

    pairs: int
    dropped_prompts: Counter[str]
    dropped_responses: Counter[str]


def rank(section: RankSection) -> Ranked:
    """Write the pairs of ``section.samples`` to ``section.output``, replacing an existing file once all are ranked.

    Raises:
        UserError: the samples are incomplete; scores are missing, not numbers, too few or too many; or no pair is left.
    """
    with Lock(section.output):
        return _rank(section)


def _rank(section: RankSection) -> Ranked:
    folder = Path(section.samples)
    manifest = read_manifest(folder / MANIFEST_NAME, FORMAT, VERSION)
    score = _score_function(section)
    prompts, responses = Counter(), Counter()
    pairs = []
    with Progress("rank", "prompts", manifest["prompts"]) as progress:
        for row in (row for name in manifest["shards"] for _, row in read_rows(folder / name)):
            kept = _usable(row["responses"], section.truncated == "keep", responses)
            if len(kept) < 2:
                prompts[IDENTICAL_RESPONSES if len({r["text"] for r in row["responses"]}) == 1 else TOO_FEW] += 1
                progress.skipped(1)
                continue
            scores = finite_scores(row["prompt_id"], score(row, kept), len(kept))
            best, worst = best_and_worst(scores, [_length(response) for response in kept])
            if scores[best] == scores[worst]:
                prompts[EQUAL_SCORES] += 1
            else:
                pairs.append(_pair(row, kept[best], kept[worst], scores[best], scores[worst]))
            progress.worked(1, sum(map(_length, kept)))
    if not pairs:
        raise UserError(f"{folder}: no pair is left ({', '.join(f'{n} dropped: {r}' for r, n in prompts.items())})")
    with atomic_write(section.output) as partial:
        partial.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    return Ranked(len(pairs), prompts, responses)


def best_and_worst(scores: Sequence[float], lengths: Sequence[int]) -> tuple[int, int]:
    """Indices of the chosen and the rejected response; ties are broken by length, then by order.

    Args:
        scores: one per response, higher is better.
        lengths: one per response, in tokens or characters.
    """
    best = min((i for i in range(len(scores)) if scores[i] == max(scores)), key=lambda i: lengths[i])
    worst = min(
        (i for i in range(len(scores)) if scores[i] == min(scores)), key=lambda i: abs(lengths[i] - lengths[best])
    )
    return best, worst


def _usable(responses: list[dict[str, Any]], truncated: bool, dropped: Counter[str]) -> list[dict[str, Any]]:
    kept, texts = [], set()
    for response in responses:
        if not response["text"].strip():
            dropped[EMPTY_RESPONSE] += 1
        elif not truncated and not response["finished"]:
            dropped[TRUNCATED] += 1
        elif response["text"] in texts:
            dropped[REPEATED_RESPONSE] += 1
        else:
            texts.add(response["text"])
            kept.append(response)
    return kept


def _length(response: dict[str, Any]) -> int:
    """Length in tokens, or in characters if the server did not return token ids."""
    return len(response["ids"] or response["text"])


def _pair(row: dict, chosen: dict, rejected: dict, chosen_score: float, rejected_score: float) -> dict[str, Any]:
    pair = {
        "pair_id": row["prompt_id"],
        "prompt": row["messages"],
        "chosen": chosen["text"],
        "rejected": rejected["text"],
        "chosen_score": chosen_score,
        "rejected_score": rejected_score,
    }
    if chosen["ids"] is not None and rejected["ids"] is not None:
        pair |= {"chosen_ids": chosen["ids"], "rejected_ids": rejected["ids"], "tokenizer": row["tokenizer"]}
    return pair


# -- sources of scores -------------------------------------------------------------------------------------------------


def _score_function(section: RankSection) -> Callable[[dict, list[dict]], Sequence[float]]:
    name = section.scores
    if getattr(section, name) is None:
        raise UserError(f"rank.scores is {name}, but rank.{name} has no value")
    if name == "column":
        return lambda row, kept: [_column(row, response, section.column) for response in kept]
    if name == "function":
        function = imported_function(section.function, "rank.function")
    else:
        function = RewardModel(section, "rank")
    return lambda row, kept: function(row["messages"], [response["text"] for response in kept])


def _column(row: dict, response: dict, column: str) -> float:
    if response.get(column) is None:
        raise UserError(f"prompt {row['prompt_id']!r}: a response has no key {column!r}; it has {', '.join(response)}")
    return response[column]
