"""Synthetic task with token-level ground truth: short tasks, longer answers, planted errors, and a verifier.

A task applies one operation to four items, and an answer goes through them in order:

    add 7 : 3 9 0 5          so 3 makes 1 0 then 9 gives 1 6 next 0 makes 0 7 and 5 is 1 2

Every word is one token. Connectors and verbs are free choices, all equally right. Everything else is determined by the
task. The result of an operation on an item is a *fact*. Each fact has one popular error, which changes one token of the
result, and a rate at which annotators make it: rare for some facts, the majority for others, so that a token's
likelihood does not show whether it is right. Fillers ("um") may occur before an item.

The verifier aligns an answer with the slots of the right one and marks each token right or wrong.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

ITEMS = 4
CONNECTORS = ("so", "then", "next", "and", "also", "now")
VERBS = ("makes", "gives", "is")
FILLERS = ("um", "well", "hmm")
DIGITS = tuple("0123456789")
WORDS = (
    "cat",
    "dog",
    "sun",
    "hat",
    "pen",
    "cup",
    "map",
    "fox",
    "bed",
    "jar",
    "leg",
    "kit",
    "nut",
    "owl",
    "rib",
    "web",
    "yam",
    "zip",
    "gum",
    "ivy",
)
UNITS = {"weeks": 7, "feet": 12, "yards": 3, "hours": 60}
LANGUAGES = ("elvish", "norse", "martian")
DIRECTIONS = ("forwards", "backwards")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
ERROR_RATES = (0.1, 0.5, 0.9)


class Fact(NamedTuple):
    """Result of an operation on an item, its popular error, and how often annotators make that error."""

    right: tuple[str, ...]
    popular_error: tuple[str, ...]
    error_rate: float


class Operation(NamedTuple):
    """One kind of task: its possible arguments and items, and its results."""

    arguments: tuple[str, ...]
    items: tuple[str, ...]
    result: Callable[[str, str], tuple[str, ...]]
    alphabet: Callable[[str], tuple[str, ...]]  # argument -> tokens that may occur in a result


def _foreign(language: str, word: str) -> str:
    """A made-up word of two syllables."""
    draw = random.Random(f"{language} {word}")
    return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(2)) + language[0]


OPERATIONS = {
    "add": Operation(DIGITS[1:], DIGITS, lambda k, x: tuple(f"{int(k) + int(x):02d}"), lambda k: DIGITS),
    "convert": Operation(
        tuple(UNITS), DIGITS, lambda unit, x: tuple(f"{UNITS[unit] * int(x):03d}"), lambda unit: DIGITS
    ),
    "spell": Operation(
        DIRECTIONS, WORDS, lambda way, word: tuple(word if way == "forwards" else word[::-1]), lambda way: LETTERS
    ),
    "say": Operation(
        LANGUAGES,
        WORDS,
        lambda language, word: (_foreign(language, word),),
        lambda language: tuple(_foreign(language, word) for word in WORDS),
    ),
}


def fact(operation: str, argument: str, item: str) -> Fact:
    """The fact about an item; deterministic, as it is drawn from a hash of its name."""
    op = OPERATIONS[operation]
    right = op.result(argument, item)
    draw = random.Random(f"{operation} {argument} {item}")
    place = draw.randrange(len(right))
    wrong = draw.choice([token for token in op.alphabet(argument) if token != right[place]])
    return Fact(right, (*right[:place], wrong, *right[place + 1 :]), draw.choice(ERROR_RATES))


@dataclass(frozen=True)
class Task:
    """An operation with its argument and the items that it is applied to."""

    operation: str
    argument: str
    items: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The task as text, one space between tokens."""
        return " ".join((self.operation, self.argument, ":", *self.items))

    @property
    def facts(self) -> list[Fact]:
        """The fact about each item, in order."""
        return [fact(self.operation, self.argument, item) for item in self.items]

    @property
    def content(self) -> str:
        """The set of items as text: tasks on the same items always belong to the same split."""
        return " ".join(sorted(self.items))


def task_of(prompt: str) -> Task:
    """The task of a prompt, inverse of :attr:`Task.prompt`."""
    operation, argument, _, *items = prompt.split()
    return Task(operation, argument, tuple(items))


@dataclass(frozen=True)
class Writer:
    """Simulated annotator that makes popular errors and inserts fillers.

    Attributes:
        error_rate: probability of a popular error; None for each fact's own rate.
        filler_rate: probability of a filler before an item.
    """

    error_rate: float | None
    filler_rate: float

    def answer(self, task: Task, draw: random.Random) -> str:
        """A random answer to a task."""
        tokens: list[str] = []
        for item, known in zip(task.items, task.facts):
            if draw.random() < self.filler_rate:
                tokens.append(draw.choice(FILLERS))
            rate = known.error_rate if self.error_rate is None else self.error_rate
            result = known.popular_error if draw.random() < rate else known.right
            tokens += [draw.choice(CONNECTORS), item, draw.choice(VERBS), *result]
        return " ".join(tokens)


def splits(seed: int, sizes: dict[str, int], shares: dict[str, float]) -> dict[str, list[Task]]:
    """Distinct random tasks for each split; no two splits share a set of items.

    Args:
        sizes: number of tasks per split.
        shares: share of all sets of items per split; they add up to 1.
    """
    draw = random.Random(f"tasks {seed}")
    found: dict[str, dict[str, Task]] = {name: {} for name in sizes}
    while any(len(found[name]) < size for name, size in sizes.items()):
        operation = draw.choice(tuple(OPERATIONS))
        op = OPERATIONS[operation]
        task = Task(operation, draw.choice(op.arguments), tuple(draw.sample(op.items, ITEMS)))
        name = _split_of(task.content, shares)
        if len(found[name]) < sizes[name]:
            found[name].setdefault(task.prompt, task)
    return {name: list(tasks.values()) for name, tasks in found.items()}


def _split_of(content: str, shares: dict[str, float]) -> str:
    place = int.from_bytes(hashlib.sha256(content.encode()).digest()[:4], "little") / 2**32
    for name, share in shares.items():
        if place < share:
            return name
        place -= share
    return name


# -- the verifier ------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """The verifier's marks of an answer: per token, of its end, and per item (the whole result); score in [0, 1]."""

    right: list[bool]
    end_is_right: bool
    results: list[bool]
    score: float


def verify(task: Task, answer: str) -> Verdict:
    """Align an answer with the slots of the right one by minimum edit distance.

    A token is right if it is aligned with a slot that accepts it; the end is right if no slot is left. The score is
    max(0, 1 - edits / slots), where edits are wrong, superfluous and missing tokens.
    """
    slots, tokens = _slots(task), answer.split()
    accepted = [slot.accepted for slot in slots]
    edits = _edit_table(accepted, tokens)
    right, results, end_is_right = [False] * len(tokens), [True] * len(task.items), True
    s, t = len(slots), len(tokens)
    while s or t:
        fits = bool(s and t) and tokens[t - 1] in accepted[s - 1]
        paired = s and t and edits[s][t] == edits[s - 1][t - 1] + (not fits)
        if not paired and t and edits[s][t] == edits[s][t - 1] + 1:
            t -= 1  # a superfluous token
            continue
        s -= 1
        if paired:
            t -= 1
            right[t] = fits
        else:
            end_is_right &= t < len(tokens)  # a token is missing
        if slots[s].result_of is not None:
            results[slots[s].result_of] &= bool(paired) and fits
    return Verdict(right, end_is_right, results, max(0.0, 1 - edits[-1][-1] / len(slots)))


def scores(messages: list[dict[str, str]], responses: Sequence[str]) -> list[float]:
    """The verifier's scores of some responses, as the scoring function of ``tools/rank_responses.py``."""
    task = task_of(messages[-1]["content"])
    return [verify(task, response).score for response in responses]


class _Slot(NamedTuple):
    accepted: frozenset[str]
    result_of: int | None  # index of the item, if the slot belongs to its result


def _slots(task: Task) -> list[_Slot]:
    slots = []
    for number, (item, known) in enumerate(zip(task.items, task.facts)):
        slots += [_Slot(frozenset(words), None) for words in (CONNECTORS, [item], VERBS)]
        slots += [_Slot(frozenset([token]), number) for token in known.right]
    return slots


def _edit_table(slots: list[frozenset[str]], tokens: list[str]) -> list[list[int]]:
    """[s][t]: edit distance between the first s slots and the first t tokens."""
    table = [list(range(len(tokens) + 1))]
    for s, slot in enumerate(slots, start=1):
        row = [s]
        for t, token in enumerate(tokens, start=1):
            row.append(min(table[-1][t - 1] + (token not in slot), table[-1][t] + 1, row[-1] + 1))
        table.append(row)
    return table
