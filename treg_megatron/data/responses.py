"""Token ids of a pair's responses, why a pair is dropped, and its record once it is labelled."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from treg_megatron.data.labelled_pairs import LabelledPair
from treg_megatron.data.pairs import Pair, conversation_text
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.chat import ChatTokenizer
from treg_megatron.tokenizer.conversation import FirstTurn, Message

PROMPT_FILLS_CONTEXT = "prompt fills max_length"
TOO_LONG = "prompt and response do not fit max_length"


def prompt_answers(pair: Pair) -> tuple[str, ...]:
    """The answers that decide where the pair's prompt ends; none where their ids are sampled."""
    if pair.chosen_ids is not None:
        return ()
    sides = ((pair.chosen, pair.chosen_turns), (pair.rejected, pair.rejected_turns))
    return tuple(_beginning(turns) if turns else text for text, turns in sides)


def _beginning(turns: tuple[Message, ...]) -> str:
    return FirstTurn(turns[0].content) if len(turns) > 1 else turns[0].content


def scored_response(pair: Pair, side: str, tokenizer: ChatTokenizer) -> tuple[list[int], np.ndarray]:
    """Token ids of one side's response, and which of them are scored, [n] bool: those that the assistant writes.

    Raises:
        UserError: as for :func:`response_ids`, or the template has no exact ids for an answer of several turns.
    """
    if turns := getattr(pair, f"{side}_turns"):
        return tokenizer.encode_turns(pair.messages, turns, pair.tools, prompt_answers(pair))
    ids = response_ids(pair, side, tokenizer)
    return ids, np.ones(len(ids), dtype=bool)


def further_turns(
    pair: Pair, side: str, response_ids: list[int], further: Sequence[Message], tokenizer: ChatTokenizer
) -> list[int]:
    """Token ids that continue prompt and response of one side by further turns, up to the assistant's next text.

    Raises:
        UserError: the template rejects the further turns, or renders the response differently before them.
    """
    answer = getattr(pair, f"{side}_turns") or (Message("assistant", getattr(pair, side)),)
    ids = tokenizer.encode_further(pair.messages, answer, further, pair.tools, prompt_answers(pair))
    return ids[1:] if response_ids[-1] == ids[0] else ids  # a response that was cut off has no end of its turn


def require_text(pair: Pair, side: str) -> None:
    """Require that one side's answer is the text of a single turn.

    Raises:
        UserError: it has several turns, or calls a tool.
    """
    if getattr(pair, f"{side}_turns"):
        raise UserError(f"{side} has several turns or calls a tool; this step takes answers that are one text")


def response_ids(pair: Pair, side: str, tokenizer: ChatTokenizer) -> list[int]:
    """Token ids of one side's response: the sampled ones if the pair carries them, otherwise those of its text.

    Raises:
        UserError: the ids were sampled with another tokenizer, or the answer has several turns.
    """
    require_text(pair, side)
    sampled = getattr(pair, f"{side}_ids")
    if sampled is None:
        return tokenizer.encode_response(pair.messages, getattr(pair, side), pair.tools, prompt_answers(pair))
    if pair.tokenizer != tokenizer.sha256:
        raise UserError(
            "its response ids were sampled with another tokenizer; label it with the model that sampled "
            "it, or remove chosen_ids and rejected_ids to have the text tokenised"
        )
    if max(sampled) >= tokenizer.vocab_size:
        raise UserError(f"{side}_ids holds {max(sampled)}, but the tokenizer has only {tokenizer.vocab_size} tokens")
    return list(sampled)


def labelled_pair(pair: Pair, columns: dict[str, Any]) -> LabelledPair:
    """``pair`` with its per-token ``columns`` (tokens, token rewards, reference log-probs of both sides)."""
    return LabelledPair(
        pair.pair_id,
        **columns,
        chosen_score=pair.chosen_score,
        rejected_score=pair.rejected_score,
        pair_weight=pair.pair_weight,
        prompt=conversation_text(pair.messages),
        chosen=pair.chosen,
        rejected=pair.rejected,
    )
