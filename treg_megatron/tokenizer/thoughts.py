"""Where a response begins if it may bring thoughts: ``<think>...</think>`` before the answer itself.

Three texts may stand between the part of a prompt that no answer changes, the base, and the answer's own text:

    nothing                                         most templates
    the opening, ``<think>\\n``                      the generation prompt ends in it (DeepSeek-R1)
    the block, ``<think>\\n\\n</think>\\n\\n``           the template adds it to an answer without thoughts (Qwen 3)

A model that thinks generates its thoughts itself, so whatever precedes an answer's text must be what its model would
have read or written there:

    an answer without thoughts continues the block, where the template renders one;
    an answer that begins with ``<think>`` stands by itself;
    an answer that holds ``</think>`` alone continues the opening.

The prompt's end is the longest of the three texts with which all responses to it begin, so that the two sides of a pair
share their prompt; what is left of it belongs to the responses.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from treg_megatron.errors import UserError
from treg_megatron.tokenizer.conversation import Message
from treg_megatron.tokenizer.template import PROBES, ChatTemplate

BEGIN, END = "<think>", "</think>"
_OPENING = re.compile(re.escape(BEGIN) + r"\s*\Z")


def without_thoughts(text: str) -> str:
    """What follows a text's last thoughts; all of it if it has none."""
    return text.rpartition(END)[2]


@dataclass(frozen=True)
class Boundary:
    """What a template puts around a response. Made by :func:`probe_boundary`.

    Attributes:
        opening: the end of the generation prompt that opens an answer's thoughts; usually empty.
        block: the text before an answer without thoughts; usually empty.
        usual: what ends the prompt of an unknown answer: the block where the template renders it after its generation
            prompt, otherwise the opening.
        stacks: whether the template puts the block before an answer with thoughts, too.
        end: the text after an answer.
    """

    opening: str
    block: str
    usual: str
    stacks: bool
    end: str

    def lead(self, answers: Sequence[str]) -> str:
        """The text between the base and the responses that ends the prompt common to ``answers``."""
        if not answers:
            return self.usual
        whole = ["".join(self.parts(answer)) for answer in answers]
        candidates = sorted((self.block, self.opening), key=len, reverse=True)
        return next((lead for lead in candidates if all(text.startswith(lead) for text in whole)), "")

    def parts(self, answer: str) -> tuple[str, str]:
        """The template's text before an answer, counted from the base, and the answer."""
        if not self.brings_thoughts(answer):
            return self.block, answer
        return ("" if answer.lstrip().startswith(BEGIN) else self.opening), answer

    def brings_thoughts(self, answer: str) -> bool:
        """Whether an answer holds thoughts for which the template makes room."""
        return END in answer and not self.stacks

    def base(self, prompt: str) -> str:
        """``prompt``, which ends in the generation prompt, without the opening."""
        return prompt.removesuffix(self.opening)


def probe_boundary(template: ChatTemplate) -> Boundary:
    """The boundary of a template.

    A lone space before an answer belongs to it: a model that continues the prompt generates it.

    Raises:
        UserError: the template does not render a response after its prompt, or not always in the same way.
    """
    first, second = (_probed(template, *words) for words in PROBES)
    if first is None or first != second:
        raise UserError(f"the chat template of {template.folder} does not render a response after its prompt")
    return first


def _probed(template: ChatTemplate, question: str, answer: str, thought: str) -> Boundary | None:
    asked = [Message("user", question)]
    prompt = template.render(asked, True)
    found = _OPENING.search(prompt)
    opening = found[0] if found else ""
    base = prompt.removesuffix(opening)
    whole = template.render([*asked, Message("assistant", answer)], False)
    block, found_answer, end = whole.removeprefix(base).partition(answer)
    if not whole.startswith(base) or not found_answer:
        return None
    block = block if block.strip(" ") else ""
    usual = block if (base + block).startswith(prompt) else opening
    stacks = bool(block) and _stacks(template, asked, base + block, f"{BEGIN}\n{thought}\n{END}\n\n{answer}")
    return Boundary(opening, block, usual, stacks, end)


def _stacks(template: ChatTemplate, asked: list[Message], before: str, answer: str) -> bool:
    try:
        return template.render([*asked, Message("assistant", answer)], False).startswith(before + answer)
    except UserError:
        return False
