"""Collation of pairs into the tensors of one forward pass (padded, packed, or packed with shared prompts).

Only response tokens that the assistant writes are scored (:mod:`treg_megatron.data.scored`), so a micro-batch carries
them as flat arrays: the row of the hidden states that predicts each, its id, its token reward and its reference
log-prob. Whether sequences are padded, one per row, or packed into one sequence is decided here; downstream code is
layout-agnostic.

Dimensions: b rows, s tokens per row, n response tokens of the micro-batch on this rank.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from treg_megatron.config.schema import DataSection, ParallelSection
from treg_megatron.data.aligned import PairRecord
from treg_megatron.data.alignment import score_positions
from treg_megatron.data.prefixes import prefix_row
from treg_megatron.data.scored import is_scored
from treg_megatron.distributed.context_parallel import WHOLE, ContextPart
from treg_megatron.kernels.attention import Span
from treg_megatron.objective import segments_and_places

PADDING_TOKEN = 0  # never scored, never attended to by a scored token


def collate(
    records: Sequence[PairRecord],
    layout: str,
    pad_to_multiple_of: int = 1,
    context: ContextPart = WHOLE,
    share_prompts: bool = False,
    token_order: bool = False,
    weighted: bool = False,
) -> dict[str, Any]:
    """One micro-batch of 0 or more pairs; without pairs it consists of padding and its loss is 0.

    Args:
        layout: padded or packed; the recipe's layout bins is packed here.
        pad_to_multiple_of: s is rounded up to a multiple of this; the largest s of all micro-batches pads them all to
            one length.
        context: the part of every sequence that this context-parallel rank holds; only layout packed can be split.
        share_prompts: store the prompt of each pair once; only for layout packed without context parallelism.
        token_order: whether to return positions and ranks.
        weighted: whether to return pair_weights.

    Returns:
        tokens, position_ids: [b, s] int64; packed: b = 1.
        spans: list of :class:`~treg_megatron.kernels.attention.Span`, one per sequence before it is split over ranks,
            cu_seqlens: [spans + 1] int32, where each starts and the last one ends, and max_seqlen: int; packed only.
            Padding forms a separate sequence. With share_prompts, the prompt of a rejected sequence is the prefix of
            its span, and cu_seqlens is absent.
        rows: [n] int64, index into the flattened hidden states [s * b, hidden] that predicts each response token.
        targets: [n] int64, ids of the response tokens. lengths: list of int, response tokens on this rank of chosen 0,
            rejected 0, chosen 1, ... segments, places: [n] int64, and response_tokens: [2 * pairs] fp32, of whole
            responses: see :class:`~treg_megatron.objective.Responses`.
        token_rewards: [n] fp32. ref_logps: [n] fp32, absent if the dataset has none. pair_ids: list of str.
        positions, ranks: [n] int64, of each token in its whole response: see
            :class:`~treg_megatron.objective.Responses`.
        pair_weights: [pairs] fp32, 1 for a pair without a weight.
    """
    sequences = [tokens for r in records for tokens in (r.chosen_tokens, r.rejected_tokens)]
    rewards = [values for r in records for values in (r.chosen_token_rewards, r.rejected_token_rewards)]
    responses = [len(values) for values in rewards]
    parts = [score_positions(len(s) - n, n) for s, n in zip(sequences, responses, strict=True)]
    positions = [np.arange(part.start, part.stop) for part in parts]
    widths = [context.padded(len(s)) for s in sequences]
    scored = [is_scored(values) for values in rewards]
    masks = [context.holds(p, width) & s for p, width, s in zip(positions, widths, scored, strict=True)]

    def flat(per_response: Sequence[np.ndarray], dtype: type = np.float32) -> torch.Tensor:
        return _flat([np.asarray(values)[mask] for values, mask in zip(per_response, masks, strict=True)], dtype)

    positions = [p[mask] for p, mask in zip(positions, masks, strict=True)]
    tokens = [torch.from_numpy(np.asarray(s, dtype=np.int64)) for s in sequences]
    if share_prompts:
        prompts = [len(s) - n for s, n in zip(sequences, responses, strict=True)]
        shared = [prompt * (i % 2) for i, prompt in enumerate(prompts)]  # rejected shares its prompt with chosen
        batch = shared_row(tokens, positions, shared, pad_to_multiple_of)
    elif layout == "packed":
        batch = packed_row(tokens, positions, pad_to_multiple_of, context)
    else:
        batch = _padded(tokens, positions, pad_to_multiple_of)
    batch["targets"] = flat([s[len(s) - n :] for s, n in zip(sequences, responses, strict=True)], np.int64)
    batch["lengths"] = [len(p) for p in positions]
    batch["segments"], batch["places"] = segments_and_places(batch["lengths"])
    batch["response_tokens"] = torch.tensor([int(s.sum()) for s in scored], dtype=torch.float32)
    batch["pair_ids"] = [r.pair_id for r in records]
    batch["token_rewards"] = flat(rewards)
    if token_order:
        batch["positions"] = flat([np.cumsum(s) - 1 for s in scored], np.int64)
        batch["ranks"] = flat([_ranks(np.asarray(r), s) for r, s in zip(rewards, scored, strict=True)], np.int64)
    if weighted:
        weights = [1.0 if r.pair_weight is None else r.pair_weight for r in records]
        batch["pair_weights"] = torch.tensor(weights, dtype=torch.float32)
    if all(r.chosen_ref_logprobs is not None for r in records):
        batch["ref_logps"] = flat([x for r in records for x in (r.chosen_ref_logprobs, r.rejected_ref_logprobs)])
    return batch


def _ranks(rewards: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """[len] int64: rank of each scored token by falling reward, equal ones in order; other tokens come last."""
    order = np.argsort(np.where(scored, -rewards, np.inf), kind="stable")
    ranks = np.empty(len(rewards), dtype=np.int64)
    ranks[order] = np.arange(len(rewards))
    return ranks


def row_multiple(data: DataSection, parallel: ParallelSection) -> int:
    """Number of tokens that a row's length must be a multiple of: the recipe's value, combined with what context and
    sequence parallelism divide the row by."""
    divisor = ContextPart(0, parallel.context).divisor
    return math.lcm(data.pad_to_multiple_of, divisor * (parallel.tensor if parallel.sequence else 1))


def packed_row(
    sequences: list[torch.Tensor], positions: list[np.ndarray], multiple: int = 1, context: ContextPart = WHOLE
) -> dict[str, Any]:
    """One packed sequence: tokens, position_ids, spans, cu_seqlens, max_seqlen and rows, see :func:`collate`.

    Args:
        sequences: [s] int64 each.
        positions: int64 per sequence, the positions on this rank that predict its response tokens.
        multiple: the packed length is a multiple of this.
    """
    sequences = [_lengthened(s, context.padded(len(s))) for s in sequences]
    total = sum(len(s) for s in sequences)
    padding = _round_up(max(total, 1), multiple) - total
    if padding:
        sequences = [*sequences, torch.full((padding,), PADDING_TOKEN)]
    sizes = [len(s) for s in sequences]
    starts = np.cumsum([0, *sizes]) // context.ranks  # start of each sequence on this rank
    return {
        "tokens": torch.cat([context.of(s) for s in sequences])[None],
        "position_ids": torch.cat([context.of(torch.arange(size)) for size in sizes])[None],
        "spans": [Span(size) for size in sizes],
        "cu_seqlens": torch.tensor([0, *sizes]).cumsum(0).to(torch.int32),
        "max_seqlen": max(sizes),
        "rows": _flat(
            [start + context.row(p, size) for start, p, size in zip(starts, positions, sizes, strict=False)], np.int64
        ),
    }


def shared_row(
    sequences: list[torch.Tensor], positions: list[np.ndarray], shared: Sequence[int], multiple: int = 1
) -> dict[str, Any]:
    """One packed sequence in which a prefix that neighbours share is stored once: tokens, position_ids, spans,
    max_seqlen and rows, see :func:`collate`.

    Args:
        sequences: [s] int64 each.
        positions: int64 per sequence, the positions that predict its response tokens.
        shared: number of tokens that each sequence shares with the one before it; that of the first is 0.
        multiple: the packed length is a multiple of this.
    """
    row = prefix_row([sequence.numpy() for sequence in sequences], shared)
    padding = _round_up(max(len(row.tokens), 1), multiple) - len(row.tokens)
    return {
        "tokens": torch.from_numpy(np.append(row.tokens, np.full(padding, PADDING_TOKEN)))[None],
        "position_ids": torch.from_numpy(np.append(row.positions, np.arange(padding)))[None],
        "spans": [*row.spans, Span(padding)] if padding else row.spans,
        "max_seqlen": max([padding, *map(len, sequences)]),
        "rows": _flat([place[at] for place, at in zip(row.places, positions, strict=True)], np.int64),
    }


def _padded(sequences: list[torch.Tensor], positions: list[np.ndarray], multiple: int) -> dict[str, Any]:
    width = _round_up(max([len(s) for s in sequences], default=1), multiple)
    tokens = torch.full((max(len(sequences), 1), width), PADDING_TOKEN)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
    return {
        "tokens": tokens,
        "position_ids": torch.arange(width).expand_as(tokens),
        # Megatron's hidden states are [s, b, hidden]
        "rows": _flat([p * len(sequences) + row for row, p in enumerate(positions)], np.int64),
    }


def _lengthened(sequence: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(sequence, (0, width - len(sequence)), value=PADDING_TOKEN)


def _flat(parts: Sequence[np.ndarray], dtype: type = np.float32) -> torch.Tensor:
    return (
        torch.from_numpy(np.concatenate([np.asarray(p, dtype=dtype) for p in parts]))
        if len(parts)
        else torch.from_numpy(np.zeros(0, dtype=dtype))
    )


def _round_up(length: int, multiple: int) -> int:
    return math.ceil(length / multiple) * multiple
