"""A chat template as a function: the same conversation gives the same text on every day and machine.

What a template may take from outside is fixed here: the date is always :data:`FIXED_DATE`, and nothing random exists.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from treg_megatron.errors import UserError
from treg_megatron.tokenizer.conversation import Message
from treg_megatron.tokenizer.special_tokens import replaced_in

# Some templates write today's date into the system turn; labels must not depend on it.
FIXED_DATE = datetime(2024, 7, 26)
_DATE_STRING = "26 Jul 2024"

#: Words that no template holds, for probes: each probe is made with both rows, and the two must agree.
PROBES = (("qxvzkra", "wjpqzte", "bgkxnuz"), ("zhvqoyd", "kfwxaji", "mzqrtel"))

_NOTHING: Mapping[str, str] = MappingProxyType({})


class ChatTemplate:
    """A chat template with the inputs that it gets.

    Attributes:
        text: its Jinja text.
        sha256: hash of the text.
        folder: the tokenizer's folder, for messages.
        inputs: what the template takes from outside and this module fixes, by name; empty for a template that asks for
            nothing.
        knows_system: whether it renders a system message. If not, that is prepended to the first user turn.

    Raises:
        UserError: the text is not valid Jinja.
    """

    def __init__(self, text: str, special_tokens: Mapping[str, Any], folder: Path):
        self.text, self.folder = text, folder
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self._special_tokens = dict(special_tokens)
        try:
            _compiled(text)
            names = {name.name for name in _environment().parse(text).find_all(nodes.Name)}
        except TemplateSyntaxError as error:
            raise UserError(f"the chat template of {folder} cannot be used: {error}") from None
        takes_date = "strftime_now" in names and "date_string" not in names
        self.inputs = {"strftime_now": f"{FIXED_DATE:%Y-%m-%d}"} if takes_date else {}
        self.knows_system = True
        self.knows_system = self._renders_system()

    def render(
        self,
        messages: Sequence[Message],
        generation_prompt: bool,
        tools: str = "",
        disguise: Mapping[str, str] = _NOTHING,
    ) -> str:
        """The text of a conversation.

        Args:
            messages: the conversation.
            generation_prompt: whether the start of an assistant's turn follows it.
            tools: JSON text of a list of tools; empty if there are none.
            disguise: texts to replace in everything that comes from the conversation or the tools.

        Raises:
            UserError: the template rejects the conversation, or does not render its tool calls.
        """
        turns = [replaced_in(message.as_dict(), disguise) for message in self._folded(messages)]
        given = replaced_in(tools_from(tools), disguise) if tools else None
        if not any(turn.get("tool_calls") for turn in turns):
            return self._rendered(turns, given, generation_prompt)
        texts: list[str] = []
        refusal = None
        for form in _forms(turns):
            try:
                text = self._rendered(form, given, generation_prompt)
            except UserError as error:
                refusal = refusal or error
                continue
            if _shows_calls(text, form):
                texts.append(text)
            else:
                refusal = UserError(f"the chat template of {self.folder} does not render tool calls")
        if not texts:
            assert refusal is not None
            raise refusal
        return min(texts, key=len)  # a form that does not suit leaves an empty turn or the word None

    def _rendered(self, turns: list[dict[str, Any]], tools: list[Any] | None, generation_prompt: bool) -> str:
        try:
            return _compiled(self.text).render(
                messages=turns,
                tools=tools,
                documents=None,
                add_generation_prompt=generation_prompt,
                date_string=_DATE_STRING,
                **self._special_tokens,
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError(
                f"the chat template of {self.folder} rejects a conversation of "
                f"{', '.join(turn['role'] for turn in turns)}{' with tools' if tools else ''}: {error}"
            ) from None

    def _folded(self, messages: Sequence[Message]) -> Sequence[Message]:
        if self.knows_system or len(messages) < 2 or messages[0].role != "system":
            return messages
        system, first, *others = messages
        return [first._replace(content=f"{system.content}\n\n{first.content}"), *others]

    def _renders_system(self) -> bool:
        """Whether a system message is rendered before an answer, and still once the answer follows."""
        texts = []
        for question, system, answer in PROBES:
            asked = [Message("system", system), Message("user", question)]
            try:
                text = self.render(asked, True)
                whole = self.render([*asked, Message("assistant", answer)], False)
            except UserError:
                return False
            if system not in text or system not in whole:
                return False
            texts.append(text.replace(system, "").replace(question, ""))
        return texts[0] == texts[1]


class _Generation(Extension):
    """The tag ``{% generation %}``, by which templates mark what the assistant says. It changes no text."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Any) -> str:
        return caller()


@functools.lru_cache(1)
def _environment() -> ImmutableSandboxedEnvironment:
    """The environment of transformers' ``apply_chat_template``, without a clock and without randomness."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": FIXED_DATE.strftime}
    del environment.filters["random"], environment.globals["lipsum"]
    return environment


@functools.lru_cache(64)
def _compiled(text: str) -> Template:
    return _environment().from_string(text)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


@functools.lru_cache(8)
def tools_from(text: str) -> list[Any]:
    """The tools in their JSON text.

    Raises:
        UserError: it is not a list of objects.
    """
    try:
        tools = json.loads(text)
    except ValueError as error:
        raise UserError(f"tools must be the JSON text of a list of objects: {error}") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError("tools must be the JSON text of a list of objects")
    return tools


def _forms(turns: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The forms in which templates expect tool calls: arguments as an object or as text, no content as "" or None."""
    for as_text, nothing in itertools.product((False, True), ("", None)):
        yield [
            {
                **turn,
                "content": turn["content"] or nothing,
                "tool_calls": [_with_arguments(call, as_text) for call in turn["tool_calls"]],
            }
            if turn.get("tool_calls")
            else turn
            for turn in turns
        ]


def _with_arguments(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"], as_text)}
    arguments = call.get("arguments")
    if isinstance(arguments, dict) and as_text:
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if isinstance(arguments, str) and not as_text:
        try:
            found = json.loads(arguments)
        except ValueError:
            return call
        return {**call, "arguments": found} if isinstance(found, dict) else call
    return call


def _shows_calls(text: str, turns: list[dict[str, Any]]) -> bool:
    functions = [call.get("function", call) for turn in turns for call in turn.get("tool_calls") or ()]
    return all(
        str(function.get("name")) in text and not _as_python(function.get("arguments"), text) for function in functions
    )


def _as_python(value: Any, text: str) -> bool:
    """Whether a text holds an object in Python's way of writing, which no model was trained on."""
    return isinstance(value, dict) and str(value) != json.dumps(value, ensure_ascii=False) and str(value) in text
