"""Where a response begins if it may bring thoughts: ``<think>...</think>`` before the answer itself.

Three texts may stand between the part of a prompt that no answer changes, the base, and the answer's own text:

    nothing                                         most templates
    the opening, ``<think>\\n``                      the generation prompt ends in it (DeepSeek-R1)
    the block, ``<think>\\n\\n</think>\\n\\n``           the template adds it to an answer without thoughts (Qwen 3), or
                                                  its generation prompt already ends in it (DeepSeek-V3.1)

A model that thinks generates its thoughts itself, so whatever precedes an answer's text must be what its model would
have read or written there:

    an answer without thoughts continues the block, where the template renders one;
    an answer that begins with ``<think>`` stands by itself;
    an answer that holds ``</think>`` alone continues the opening.

The prompt's end is the longest of the three texts with which all responses to it begin, so that the two sides of a pair
share their prompt; what is left of it belongs to the responses. An answer of several turns begins as a template renders
an earlier turn, which may be without a block.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from treg_megatron.errors import UserError
from treg_megatron.tokenizer.conversation import FirstTurn, Message
from treg_megatron.tokenizer.template import PROBES, ChatTemplate

BEGIN, END = "<think>", "</think>"
_TAIL = re.compile(rf"(?:{BEGIN}\s*(?:{END}\s*)?|{END}\s*)\Z")


def without_thoughts(text: str) -> str:
    """What follows a text's last thoughts; all of it if it has none."""
    return text.rpartition(END)[2]


@dataclass(frozen=True)
class Boundary:
    """What a template puts around a response. Made by :func:`probe_boundary`.

    Attributes:
        tail: the end of the generation prompt that opens or closes an answer's thoughts; usually empty.
        block: the text between base and answer, the former being the prompt without its tail; usually empty.
        plain: what a model has read before it writes an answer without thoughts: the block, or else a tail that closes
            thoughts.
        head: the part of the block that stands before an answer with thoughts, too.
        followed: the text between base and an answer that further turns follow.
        usual: what ends the prompt of an unknown answer: the block where the template renders it after its generation
            prompt, otherwise the opening.
        stacks: whether the template puts the block before an answer with thoughts, too.
        end: the text after an answer.
    """

    tail: str
    block: str
    plain: str
    head: str
    followed: str
    usual: str
    stacks: bool
    end: str

    @property
    def opening(self) -> str:
        """The tail if it opens thoughts."""
        return "" if END in self.tail else self.tail

    def at(self, prompt: str) -> "Boundary":
        """The boundary of a prompt that may lack the tail, such as one after a tool's result."""
        if prompt.endswith(self.tail):
            return self
        names = ("block", "plain", "followed", "usual")
        return replace(self, tail="", **{name: getattr(self, name).removeprefix(self.tail) for name in names})

    def lead(self, answers: Sequence[str]) -> str:
        """The text between the base and the responses that ends the prompt common to ``answers``."""
        if not answers:
            return self.usual
        whole = ["".join(self.parts(answer)) for answer in answers]
        candidates = sorted((self.plain, self.opening, self.head), key=len, reverse=True)
        return next((lead for lead in candidates if all(text.startswith(lead) for text in whole)), "")

    def parts(self, answer: str) -> tuple[str, str]:
        """The template's text before an answer, counted from the base, and the answer."""
        if isinstance(answer, FirstTurn):
            return self.followed, answer
        if not self.brings_thoughts(answer):
            return self.plain, answer
        if answer.lstrip().startswith(BEGIN):
            return ("" if answer.startswith(self.head) else self.head), answer
        return self.opening, answer

    def brings_thoughts(self, answer: str) -> bool:
        """Whether an answer holds thoughts for which the template makes room."""
        return END in answer and not self.stacks

    def base(self, prompt: str) -> str:
        """``prompt``, which ends in the generation prompt, without the tail."""
        return prompt.removesuffix(self.tail)


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
    found = _TAIL.search(prompt)
    tail = found[0] if found else ""
    base = prompt.removesuffix(tail)
    whole = template.render([*asked, Message("assistant", answer)], False)
    block, found_answer, end = whole.removeprefix(base).partition(answer)
    if not whole.startswith(base) or not found_answer:
        return None
    block = block if block.strip(" ") else ""
    usual = block if (base + block).startswith(prompt) else tail
    thinking = f"{BEGIN}\n{thought}\n{END}\n\n{answer}"
    stacks = bool(block) and _renders(template, asked, thinking, base + block + thinking)
    head = block.partition(BEGIN)[0] if BEGIN in block else ""
    head = head if head and _renders(template, asked, thinking, base + head + BEGIN) else ""
    plain = block or (tail if END in tail else "")
    followed = _followed(template, [*asked, Message("assistant", answer)], base, answer, usual)
    return Boundary(tail, block, plain, head, followed, usual, stacks, end)


def _followed(template: ChatTemplate, answered: list[Message], base: str, answer: str, usual: str) -> str:
    """The text between base and an answer that further turns follow; ``usual`` where the template takes none."""
    try:
        longer = template.render([*answered, answered[0], answered[1]], False)
    except UserError:
        return usual
    before, found, _ = longer.removeprefix(base).partition(answer)
    return (before if before.strip(" ") else "") if longer.startswith(base) and found else usual


def _renders(template: ChatTemplate, asked: list[Message], answer: str, begin: str) -> bool:
    """Whether the conversation with its answer begins with a text."""
    try:
        return template.render([*asked, Message("assistant", answer)], False).startswith(begin)
    except UserError:
        return False
