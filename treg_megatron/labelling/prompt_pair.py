"""Better/worse prompt pairs: two prompts that differ only in the answer quality they lead a model to expect.

The texts are data: ``prompt_pairs/*.yaml``, or a user's own file in the same form:

    turns:                          # what the model reads before the response, in order
      - role: user                  # user and assistant alternate, starting with user
        content: text with {placeholders}
      - conversation                # the bare word inserts the turns of the pair's conversation
    fill:                           # the only difference between the two prompts
      better: {placeholder: text}
      worse: {placeholder: other text}

``{conversation}`` (the conversation as text) and ``{response}`` (the candidate answer) need no fill. Put whatever
varies late: the text before it is common to both prompts and is computed once.

If the turns begin with ``conversation`` and ``{role: assistant, content: "{response}"}``, the response is the
conversation's answer, and the prompts begin with exactly the token ids of the two (:attr:`PromptPair.answers_first`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from treg_megatron.data.pairs import conversation_text
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.conversation import Message
from treg_megatron.utils.files import sha256_of_json

FOLDER = Path(__file__).resolve().parent / "prompt_pairs"
CONVERSATION = "conversation"
RESPONSE = "response"

_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True)
class PromptPair:
    """A validated prompt pair. ``sha256`` covers its texts, not the comments or the layout of its file."""

    name: str
    turns: tuple[Message | str, ...]
    fill: Mapping[str, Mapping[str, str]]
    sha256: str

    def better(self, messages: Sequence[Message], response: str) -> list[Message]:
        """The prompt x_better, ending with a user turn, to be rendered by the model's chat template."""
        return self._filled("better", messages, response)

    def worse(self, messages: Sequence[Message], response: str) -> list[Message]:
        """The prompt x_worse, in the same form as :meth:`better`."""
        return self._filled("worse", messages, response)

    @property
    def shows_response(self) -> bool:
        """Whether the prompts contain the response, so that their length grows with it."""
        return any(RESPONSE in _placeholders(turn) for turn in self.turns)

    @property
    def answers_first(self) -> bool:
        """Whether the prompts are the conversation and the response as its answer, with further turns behind them."""
        return self.turns[:2] == (CONVERSATION, Message("assistant", f"{{{RESPONSE}}}"))

    def _filled(self, side: str, messages: Sequence[Message], response: str) -> list[Message]:
        values = {CONVERSATION: conversation_text(messages), RESPONSE: response, **self.fill[side]}
        filled: list[Message] = []
        for turn in self.turns:
            if turn == CONVERSATION:
                # Keep a system message first: chat templates accept one nowhere else.
                system = [m for m in messages if m.role == "system"]
                filled = [*system, *filled, *messages[len(system) :]]
            else:
                # Substitute in one pass, so that braces in the user's own text are never placeholders.
                text = _PLACEHOLDER.sub(lambda match: values[match[1]], turn.content)
                filled.append(Message(turn.role, text))
        return filled


def load_prompt_pair(name_or_path: str | Path) -> PromptPair:
    """Read a built-in prompt pair by name, or a user's own YAML file by path.

    Raises:
        UserError: there is no such name or file, or its turns, placeholders and fills are inconsistent.
    """
    built_in = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    path = FOLDER / f"{name_or_path}.yaml" if str(name_or_path) in built_in else Path(name_or_path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"prompt pair {name_or_path} is neither built in ({', '.join(built_in)}) nor a readable file: "
            f"{error.strerror}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"prompt pair {path} is not valid YAML: {error}") from None
    try:
        turns, fill = _turns(content), _fill(content)
        _require_fitting_placeholders(turns, fill)
    except ValueError as error:
        raise UserError(f"prompt pair {path}: {error}") from None
    return PromptPair(path.stem, turns, fill, sha256_of_json([turns, fill]))


def _turns(content: Any) -> tuple[Message | str, ...]:
    if not isinstance(content, dict) or set(content) != {"turns", "fill"}:
        raise ValueError("must be a mapping with the keys `turns` and `fill`, and no others")
    if not isinstance(content["turns"], list) or not content["turns"]:
        raise ValueError("`turns` must be a list of {role, content} and the word `conversation`")
    turns = tuple(_turn(turn, number) for number, turn in enumerate(content["turns"], start=1))
    expected = "user"
    for number, turn in enumerate(turns, start=1):
        role = "user" if turn == CONVERSATION else turn.role
        if role != expected:
            raise ValueError(f"turn {number} is the {role}'s but must be the {expected}'s: they alternate")
        expected = "assistant" if role == "user" else "user"  # a spliced conversation ends with a user turn, too
    if expected != "assistant":
        raise ValueError("the last turn must be the user's: the response follows it")
    return turns


def _turn(turn: Any, number: int) -> Message | str:
    if turn == CONVERSATION:
        return CONVERSATION
    if not isinstance(turn, dict) or set(turn) != {"role", "content"} or not isinstance(turn["content"], str):
        raise ValueError(f"turn {number} must be {{role, content}} with text as content, or the word `conversation`")
    if turn["role"] not in ("user", "assistant"):
        raise ValueError(
            f"turn {number} has role {turn['role']!r}; use user or assistant: not every chat template has a system role"
        )
    return Message(turn["role"], turn["content"])


def _fill(content: dict) -> dict[str, dict[str, str]]:
    fill = content["fill"]
    if not isinstance(fill, dict) or set(fill) != {"better", "worse"}:
        raise ValueError("`fill` must have exactly the keys `better` and `worse`")
    for side, values in fill.items():
        if not isinstance(values, dict) or not values or not all(isinstance(v, str) for v in values.values()):
            raise ValueError(f"`fill.{side}` must map placeholders to texts")
        for name in (CONVERSATION, RESPONSE):
            if name in values:
                raise ValueError(f"`fill.{side}` redefines {{{name}}}")
    if different := set(fill["better"]) ^ set(fill["worse"]):
        raise ValueError(f"`fill.better` and `fill.worse` must have the same keys; only one has {_listed(different)}")
    if fill["better"] == fill["worse"]:
        raise ValueError("`fill.better` and `fill.worse` are equal: every token reward would be 0")
    return fill


def _require_fitting_placeholders(turns: tuple[Message | str, ...], fill: dict[str, dict[str, str]]) -> None:
    used = set().union(*map(_placeholders, turns))
    if unknown := used - {CONVERSATION, RESPONSE} - set(fill["better"]):
        raise ValueError(f"no fill for placeholder {_listed(unknown)}")
    if unused := set(fill["better"]) - used:
        raise ValueError(f"no turn has placeholder {_listed(unused)}")
    if CONVERSATION not in used and CONVERSATION not in turns:
        raise ValueError(
            "neither a turn `conversation` nor a placeholder {conversation}: the prompts would not depend on the pair"
        )


def _placeholders(turn: Message | str) -> set[str]:
    return set() if turn == CONVERSATION else set(_PLACEHOLDER.findall(turn.content))


def _listed(names: set[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in sorted(map(str, names)))
