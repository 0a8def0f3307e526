"""Preference pairs as sequences to score: from any file of pairs, or from labelled pairs, which bring the reference.

A pair that does not fit is dropped whole and counted, as in labelling.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from treg_megatron.config.schema import AccuracySection
from treg_megatron.data.labelled_pairs import SIDES, labelling_run, read_labelled
from treg_megatron.data.pairs import IDENTICAL_RESPONSES, Pair, Reading, none_left, read_pairs_and_rows
from treg_megatron.data.records import is_parquet, source_identity
from treg_megatron.data.responses import PROMPT_FILLS_CONTEXT, TOO_LONG, prompt_answers, scored_response
from treg_megatron.data.scored import is_scored
from treg_megatron.errors import UserError
from treg_megatron.evaluation.accuracy.log_probs import Item, sequence
from treg_megatron.labelling.scoring import sequences_of
from treg_megatron.tokenizer.chat import ChatTokenizer

_LABELLED_COLUMNS = {f"{side}_{name}" for side in SIDES for name in ("tokens", "token_rewards")}


@dataclass
class PairItems:
    """Preference pairs as items, both sides of each.

    Attributes:
        items: the pairs, chosen first.
        subsets: the subset of each pair, or None.
        prompts: a number for each pair's prompt.
        drops: counts of the pairs left out, by reason.
        identity: of the source: name and hash.
        reference: log pi_ref of each pair's sides, [scored tokens] fp32, in nats, where the labels bring it.
        reference_identity: of the model that they are from.
    """

    identity: dict[str, Any]
    items: list[Item] = field(default_factory=list)
    subsets: list[str | None] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    reference: list[list[np.ndarray]] | None = None
    reference_identity: dict[str, Any] | None = None

    def add(self, item: Item, subset: str | None, numbers: dict[tuple[int, ...], int]) -> None:
        """Append a pair; ``numbers`` are those of the prompts so far."""
        self.items.append(item)
        self.subsets.append(subset)
        self.prompts.append(numbers.setdefault(tuple(item.sequences[0].prompt_ids), len(numbers)))


def pair_items(section: AccuracySection, tokenizer: ChatTokenizer) -> PairItems:
    """The pairs of ``section.pairs`` with the ids that training would see.

    Raises:
        UserError: the source is unusable, was labelled with another tokenizer, or no pair is left.
    """
    pairs = _labelled(section, tokenizer) if is_labelled(section.pairs) else _read(section, tokenizer)
    if not pairs.items:
        raise UserError(none_left(section.pairs, pairs.drops))
    return pairs


def is_labelled(source: str) -> bool:
    """Whether a source is labelled pairs: a Parquet file, or a folder of such, with their columns."""
    path = Path(source).expanduser()
    path = next(iter(sorted(path.glob("*.parquet"))), path) if path.is_dir() else path
    return path.is_file() and is_parquet(path) and _LABELLED_COLUMNS <= set(pq.read_schema(path).names)


def _read(section: AccuracySection, tokenizer: ChatTokenizer) -> PairItems:
    pairs = PairItems(source_identity(section.pairs))
    numbers: dict[tuple[int, ...], int] = {}
    reading = Reading(section.format, dict(section.columns), tuple(section.ignore))
    for pair, row in read_pairs_and_rows(section.pairs, pairs.drops, reading):
        try:
            item, reason = _item(pair, section.max_length, tokenizer)
        except UserError as error:
            raise UserError(f"{section.pairs} row {pair.row}, pair {pair.pair_id}: {error}") from None
        if item is None:
            pairs.drops[reason] += 1
        else:
            subset = row.get(section.subset) if section.subset else None
            pairs.add(item, None if subset is None else str(subset), numbers)
    return pairs


def _item(pair: Pair, max_length: int, tokenizer: ChatTokenizer) -> tuple[Item | None, str]:
    prompt_ids = tokenizer.encode_prompt(pair.messages, pair.tools, prompt_answers(pair))
    if len(prompt_ids) >= max_length:
        return None, PROMPT_FILLS_CONTEXT
    responses = [scored_response(pair, side, tokenizer) for side in SIDES]
    if len(prompt_ids) + max(len(ids) for ids, _ in responses) > max_length:
        return None, TOO_LONG
    if responses[0][0] == responses[1][0]:
        return None, IDENTICAL_RESPONSES
    sequences = tuple(sequence(prompt_ids, ids) for ids, _ in responses)
    return Item(pair.pair_id, sequences, tuple(scored for _, scored in responses)), ""


def _labelled(section: AccuracySection, tokenizer: ChatTokenizer) -> PairItems:
    run = labelling_run(section.pairs) or {}
    if run.get("tokenizer", {}).get("sha256", tokenizer.sha256) != tokenizer.sha256:
        raise UserError(f"{section.pairs} was labelled with another tokenizer than that of {section.model}")
    pairs = PairItems(source_identity(section.pairs), reference_identity=run.get("reference"))
    numbers: dict[tuple[int, ...], int] = {}
    reference = []
    for item, log_probs in _labelled_items(section.pairs):
        if max(one.length for one in item.sequences) > section.max_length:
            pairs.drops[TOO_LONG] += 1
            continue
        pairs.add(item, None, numbers)
        reference.append(log_probs)
    if all(log_probs is not None for log_probs in reference):
        pairs.reference = [log_probs for log_probs in reference if log_probs is not None]
    return pairs


def _labelled_items(source: str) -> Iterator[tuple[Item, list[np.ndarray] | None]]:
    for pair in read_labelled(source):
        masks = tuple(is_scored(getattr(pair, f"{side}_token_rewards")) for side in SIDES)
        item = Item(pair.pair_id, tuple(sequence(*one) for one in sequences_of(pair)), masks)
        reference = [getattr(pair, f"{side}_ref_logprobs") for side in SIDES]
        known = None if reference[0] is None else [r[mask] for r, mask in zip(reference, masks, strict=True)]
        yield item, known
