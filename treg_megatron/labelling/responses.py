"""Token ids of a pair's responses, why a pair is dropped, and its record once it is labelled."""

from typing import Any

from treg_megatron.data.labelled_pairs import LabelledPair
from treg_megatron.data.pairs import Pair, conversation_text
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.chat import ChatTokenizer

PROMPT_FILLS_CONTEXT = "prompt fills max_length"
TOO_LONG = "prompt and response do not fit max_length"


def response_ids(pair: Pair, side: str, tokenizer: ChatTokenizer) -> list[int]:
    """Token ids of one side's response: the sampled ones if the pair carries them, otherwise those of its text.

    Raises:
        UserError: the ids were sampled with another tokenizer.
    """
    sampled = getattr(pair, f"{side}_ids")
    if sampled is None:
        return tokenizer.encode_response(pair.messages, getattr(pair, side))
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
        prompt=conversation_text(pair.messages),
        chosen=pair.chosen,
        rejected=pair.rejected,
    )
