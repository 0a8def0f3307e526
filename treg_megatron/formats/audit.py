"""Which columns of a record carry meaning that its format would drop without a word.

A column is suspicious by its name: one of the words that people use for prompts, context, tools and other media, unless
its last word says that it is only about them (``prompt_id``, ``input_tokens``). A suspicious column is accounted for if
the format reads it, or if the pair already says all that it says, as the ``messages`` of UltraFeedback do.
"""

import functools
import json
import re
from typing import Any

from treg_megatron.formats import beside
from treg_megatron.formats.fields import SCORES
from treg_megatron.formats.messages import ROLES
from treg_megatron.formats.pair_format import Answered, PairFormat

MEANINGFUL = frozenset(
    """
    audio audios background body chat chats character choices context contexts conversation conversations demonstration
    demonstrations developer dialog dialogs dialogue dialogues document documents evidence examples few file files
    function functions grounding hint hints history image images img input inputs instruct instruction instructions
    memory message messages mm multimodal passage passages persona photo picture pictures post prefill prefix
    preamble problem prompt prompts queries query question questions reasoning reference references retrieved role
    schema scratchpad story suffix system table task template thinking thought thoughts tool tools turn turns user
    video videos
    """.split()
)
ABOUT = frozenset(
    """
    id ids idx index uuid hash sha sha256 type types kind category categories source sources origin name names model
    models language languages lang count counts length lengths len num number tokens chars size score scores rating
    ratings rank ranks quality difficulty safety reward rewards label labels time timestamp date created config configs
    url urls license split version tag tags topic domain intent rationale rationales explanation feedback
    generated generator evolved setup reasonings style format flag flags level explanations
    """.split()
)
#: Records of how the data was made, which no model is meant to see.
_MADE_BY = set("raw labelling labeling labeler judge annotator gen generation distilabel metadata".split())
_KNOWN = {"pair_id", "id", "chosen_ids", "rejected_ids", "tokenizer", *SCORES["chosen"], *SCORES["rejected"]}
_STRUCTURE = {*ROLES, "text", "function"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[a-z]+|\d+")


def unread_columns(row: dict, answered: Answered, format: PairFormat) -> list[str]:
    """Columns of a record that carry meaning and are neither read nor said by the pair.

    Args:
        row: the record.
        answered: what the format read.
        format: the format.
    """
    suspicious = _suspicious(tuple(map(str, row)), format)
    unread = [name for name in suspicious if _holds_meaning(row[name])]
    return [name for name in unread if not _said(row[name], answered)] if unread else []


@functools.lru_cache(maxsize=256)
def _suspicious(columns: tuple[str, ...], format: PairFormat) -> list[str]:
    return [
        name
        for name in columns
        if name not in _KNOWN and not format.uses(name) and name not in beside.NAMES and is_meaningful(name)
    ]


def is_meaningful(column: str) -> bool:
    """Whether a column's name says that a model should see what it holds."""
    words = [word.lower() for word in _WORD.findall(column)]
    if not words or words[0] in _MADE_BY or (len(words) > 1 and words[-1] in ABOUT):
        return False
    return any(word in MEANINGFUL for word in words)


def _holds_meaning(value: Any) -> bool:
    """Whether a value could be read by a model: text, or something that holds text. Numbers and flags could not."""
    if isinstance(value, dict):
        return any(map(_holds_meaning, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_meaning, value))
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, (bytes, bytearray)) and bool(value)


def _said(value: Any, answered: Answered) -> bool:
    said = {message.content.strip() for message in answered.messages}
    for answer in (answered.chosen, answered.rejected):
        said |= {answer.strip()} if isinstance(answer, str) else {turn.content.strip() for turn in answer}
    said |= _STRUCTURE
    return all(leaf.strip() in said or not leaf.strip() for leaf in _leaves(value))


def _leaves(value: Any) -> list[str]:
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return [value]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [] if value is None else [str(value)]
