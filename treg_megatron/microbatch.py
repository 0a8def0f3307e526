"""Pairs to the tensors of one forward pass.

Only response tokens are scored, so a micro-batch carries them flat: which row of the hidden states predicts each, its
id, its token reward and its reference log-prob. That list is the same whether the sequences lie padded, one a row, or
packed, one after the other in a single row; the layout is settled here and nobody after needs to know it.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from treg_megatron.alignment import score_positions
from treg_megatron.streams import PairRecord

PADDING_TOKEN = 0  # never scored, never attended to by a scored token


def collate(records: Sequence[PairRecord], layout: str, pad_to_multiple_of: int = 1) -> dict[str, Any]:
    """One micro-batch of 0 or more pairs; without pairs it is a row of padding whose loss is 0.

    Returns:
        tokens, position_ids: [b, s] int64; packed: b = 1.
        cu_seqlens: [sequences + 1] int32 and max_seqlen: int, packed only; padding is a sequence of its own.
        rows: [n] int64, which row of the [s * b, hidden] flattened hidden states predicts response token n.
        targets: [n] int64, its id. lengths: list of int, response tokens of chosen 0, rejected 0, chosen 1, ...
        token_rewards, ref_logps: [n] fp32, absent where the streams have none. pair_ids: list of str.
    """
    sequences = [tokens for r in records for tokens in (r.chosen_tokens, r.rejected_tokens)]
    responses = [len(rewards) for r in records for rewards in (r.chosen_token_rewards, r.rejected_token_rewards)]
    scored = [score_positions(len(s) - n, n) for s, n in zip(sequences, responses, strict=True)]
    positions = [np.arange(part.start, part.stop) for part in scored]
    arrange = {"packed": _packed, "padded": _padded}[layout]
    batch = arrange([torch.from_numpy(np.asarray(s, dtype=np.int64)) for s in sequences], positions, pad_to_multiple_of)
    batch["targets"] = _flat([s[len(s) - n:] for s, n in zip(sequences, responses)], np.int64)
    batch["lengths"] = responses
    batch["pair_ids"] = [r.pair_id for r in records]
    batch["token_rewards"] = _flat([x for r in records for x in (r.chosen_token_rewards, r.rejected_token_rewards)])
    if all(r.chosen_ref_logprobs is not None for r in records):
        batch["ref_logps"] = _flat([x for r in records for x in (r.chosen_ref_logprobs, r.rejected_ref_logprobs)])
    return batch


def _packed(sequences: list[torch.Tensor], positions: list[np.ndarray], multiple: int) -> dict[str, Any]:
    lengths = [len(s) for s in sequences]
    padding = _round_up(max(sum(lengths), 1), multiple) - sum(lengths)
    starts = np.cumsum([0, *lengths])[:-1]
    if padding:
        sequences = [*sequences, torch.full((padding,), PADDING_TOKEN)]
    sizes = torch.tensor([len(s) for s in sequences])
    return {
        "tokens": torch.cat(sequences)[None],
        "position_ids": torch.cat([torch.arange(len(s)) for s in sequences])[None],
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).to(torch.int32),
        "max_seqlen": int(sizes.max()),
        "rows": _flat([start + p for start, p in zip(starts, positions)], np.int64),
    }


def _padded(sequences: list[torch.Tensor], positions: list[np.ndarray], multiple: int) -> dict[str, Any]:
    width = _round_up(max([len(s) for s in sequences], default=1), multiple)
    tokens = torch.full((max(len(sequences), 1), width), PADDING_TOKEN)
    for row, sequence in enumerate(sequences):
        tokens[row, :len(sequence)] = sequence
    return {
        "tokens": tokens,
        "position_ids": torch.arange(width).expand_as(tokens),
        # Megatron's hidden states are [s, b, hidden]
        "rows": _flat([p * len(sequences) + row for row, p in enumerate(positions)], np.int64),
    }


def _flat(parts: Sequence[np.ndarray], dtype: type = np.float32) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(p, dtype=dtype) for p in parts])) if len(parts) else \
        torch.from_numpy(np.zeros(0, dtype=dtype))


def _round_up(length: int, multiple: int) -> int:
    return math.ceil(length / multiple) * multiple
