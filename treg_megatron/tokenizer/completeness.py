"""Nothing of a conversation may vanish: what a chat template does not render is refused, never dropped in silence."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.tokenizer.conversation import Message
from treg_megatron.tokenizer.special_tokens import replaced
from treg_megatron.tokenizer.template import PROBES, ChatTemplate, tools_from
from treg_megatron.tokenizer.thoughts import without_thoughts

_REMEMBERED = 4096
_SWITCH = re.compile(r"/(no_)?think\b")  # read by some templates, and taken out


class Completeness:
    """Checks that a template renders all of a conversation.

    A conversation's own texts are looked for in its rendering. So that a short text is not taken for found because the
    template's fixed text holds it, too, each sequence of roles is also rendered once with words that no template holds.
    """

    def __init__(self, template: ChatTemplate):
        self._template = template
        self._good: set[Any] = set()

    def require(self, messages: Sequence[Message], tools: str, disguise: Mapping[str, str], text: str) -> None:
        """Require that ``text``, the rendering of the conversation, holds all of it.

        White space around a message may be lost, and so may an earlier assistant turn's thoughts.

        Raises:
            UserError: a message or a tool is missing.
        """
        shape = (tuple((message.role, bool(message.extra)) for message in messages), bool(tools))
        if shape not in self._good:
            self._require_shape(messages, tools)
            if len(self._good) > _REMEMBERED:
                self._good.clear()
            self._good.add(shape)
        for i, message in enumerate(messages):
            words = _expected(message)
            if not _holds(text, replaced(words, disguise)) and self._is_lost(messages, i, tools, disguise, text):
                raise self._dropped(message)
        if tools and not all(_holds(text, replaced(name, disguise)) for name in _names(tools)):
            raise UserError(f"the chat template of {self._template.folder} does not know tools")

    def _is_lost(self, messages: Sequence[Message], i: int, tools: str, disguise: Mapping[str, str], text: str) -> bool:
        """Whether message ``i`` is missing altogether; otherwise the template only rewrites it.

        The place of a message is where another word stands if it is put into the message.
        """
        word = PROBES[0][0]
        others = [*messages[:i], messages[i]._replace(content=word), *messages[i + 1 :]]
        before, found, after = self._template.render(others, True, tools, disguise).partition(word)
        in_place = text.startswith(before) and text.endswith(after)
        return not (found and in_place and text[len(before) : len(text) - len(after)].strip())

    def _require_shape(self, messages: Sequence[Message], tools: str) -> None:
        words = [f"{PROBES[0][0]}{i}{PROBES[0][1]}" for i in range(len(messages))]
        probe = [
            message._replace(content=word if message.content.strip() else message.content)
            for message, word in zip(messages, words, strict=True)
        ]
        try:
            text = self._template.render(probe, True, tools)
        except UserError:
            return  # it asks for contents of a certain form
        for message, word in zip(messages, words, strict=True):
            if message.content.strip() and word not in text:
                raise self._dropped(message)
        if tools and text == self._template.render(probe, True):
            raise UserError(f"the chat template of {self._template.folder} does not know tools")

    def _dropped(self, message: Message) -> UserError:
        words = message.content if len(message.content) <= 40 else message.content[:37] + "..."
        return UserError(f"the chat template of {self._template.folder} drops the {message.role} message {words!r}")


def _expected(message: Message) -> str:
    words = without_thoughts(message.content) if message.role == "assistant" else message.content
    return (_SWITCH.sub("", words) if "think" in words else words).strip()


def _holds(text: str, words: str) -> bool:
    return words in text or json.dumps(words, ensure_ascii=False)[1:-1] in text


def _names(tools: str) -> list[str]:
    found = (tool.get("function", tool) for tool in tools_from(tools))
    return [str(function["name"]) for function in found if isinstance(function, dict) and "name" in function]
