"""A made world whose truth is known: short tasks, answers of many tokens, errors that can be planted, a verifier.

A task applies one operation to four items, and an answer goes through them in order:

    add 7 : 3 9 0 5          so 3 makes 1 0 then 9 gives 1 6 next 0 makes 0 7 and 5 is 1 2

Every word is a token. Connectors and verbs are free choices, equally right. Everything else is decided by the task.
What an operation makes of an item is a *fact*; each fact has one popular error, which changes one token of the
result, and a rate at which people who answer fall for it. Of some facts the error is rare, of others it is what most
people say, so that how likely a token is does not tell whether it is right. Fillers ("um") may slip in before an item.

The verifier aligns an answer with the places of the right one and marks each token right or wrong.
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
    """What an operation makes of an item, what people often say instead, and how often."""

    right: tuple[str, ...]
    popular_error: tuple[str, ...]
    error_rate: float


class Operation(NamedTuple):
    """One kind of task: the arguments that it takes, the items that it is applied to, and its results."""

    arguments: tuple[str, ...]
    items: tuple[str, ...]
    result: Callable[[str, str], tuple[str, ...]]
    alphabet: Callable[[str], tuple[str, ...]]  # argument -> tokens that a result may hold


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
    """The same for ever: drawn from a hash of its name."""
    op = OPERATIONS[operation]
    right = op.result(argument, item)
    draw = random.Random(f"{operation} {argument} {item}")
    place = draw.randrange(len(right))
    wrong = draw.choice([token for token in op.alphabet(argument) if token != right[place]])
    return Fact(right, (*right[:place], wrong, *right[place + 1 :]), draw.choice(ERROR_RATES))


@dataclass(frozen=True)
class Task:
    """An operation with its argument, and the items that it is applied to."""

    operation: str
    argument: str
    items: tuple[str, ...]

    @property
    def prompt(self) -> str:
        return " ".join((self.operation, self.argument, ":", *self.items))

    @property
    def facts(self) -> list[Fact]:
        return [fact(self.operation, self.argument, item) for item in self.items]

    @property
    def content(self) -> str:
        """What a split keeps together: the items, in whatever order and for whatever operation."""
        return " ".join(sorted(self.items))


def task_of(prompt: str) -> Task:
    """The task that a prompt states."""
    operation, argument, _, *items = prompt.split()
    return Task(operation, argument, tuple(items))


@dataclass(frozen=True)
class Writer:
    """Somebody who answers: falls for popular errors at their own rate (None) or at one rate, and puts fillers in."""

    error_rate: float | None
    filler_rate: float

    def answer(self, task: Task, draw: random.Random) -> str:
        tokens: list[str] = []
        for item, known in zip(task.items, task.facts):
            if draw.random() < self.filler_rate:
                tokens.append(draw.choice(FILLERS))
            rate = known.error_rate if self.error_rate is None else self.error_rate
            result = known.popular_error if draw.random() < rate else known.right
            tokens += [draw.choice(CONNECTORS), item, draw.choice(VERBS), *result]
        return " ".join(tokens)


def splits(seed: int, sizes: dict[str, int], shares: dict[str, float]) -> dict[str, list[Task]]:
    """Different tasks for each split; no two splits share a set of items.

    Args:
        sizes: tasks of each split.
        shares: share of the sets of items that belong to each; they add up to 1.
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
    """Marks of an answer's tokens and of its end, whether each item's result is right in full; score in [0, 1]."""

    right: list[bool]
    end_is_right: bool
    results: list[bool]
    score: float


def verify(task: Task, answer: str) -> Verdict:
    """Align an answer with the places of the right one, at the least number of edits.

    A token is right if it stands at a place that accepts it; the end is right if no place is left. The score is one
    minus edits (tokens that are wrong, too many or missing) divided by places, or 0.
    """
    places, tokens = _places(task), answer.split()
    accepted = [place.accepted for place in places]
    edits = _edit_table(accepted, tokens)
    right, results, end_is_right = [False] * len(tokens), [True] * len(task.items), True
    p, t = len(places), len(tokens)
    while p or t:
        fits = bool(p and t) and tokens[t - 1] in accepted[p - 1]
        paired = p and t and edits[p][t] == edits[p - 1][t - 1] + (not fits)
        if not paired and t and edits[p][t] == edits[p][t - 1] + 1:
            t -= 1  # a token too many
            continue
        p -= 1
        if paired:
            t -= 1
            right[t] = fits
        else:
            end_is_right &= t < len(tokens)  # a token is missing
        if places[p].result_of is not None:
            results[places[p].result_of] &= bool(paired) and fits
    return Verdict(right, end_is_right, results, max(0.0, 1 - edits[-1][-1] / len(places)))


def scores(messages: list[dict[str, str]], responses: Sequence[str]) -> list[float]:
    """The verifier as a function that ``tools/rank_responses.py`` calls."""
    task = task_of(messages[-1]["content"])
    return [verify(task, response).score for response in responses]


class _Place(NamedTuple):
    accepted: frozenset[str]
    result_of: int | None  # the number of the item, where the place belongs to a result


def _places(task: Task) -> list[_Place]:
    places = []
    for number, (item, known) in enumerate(zip(task.items, task.facts)):
        places += [_Place(frozenset(words), None) for words in (CONNECTORS, [item], VERBS)]
        places += [_Place(frozenset([token]), number) for token in known.right]
    return places


def _edit_table(places: list[frozenset[str]], tokens: list[str]) -> list[list[int]]:
    """[p][t]: least edits between the first p places and the first t tokens."""
    table = [list(range(len(tokens) + 1))]
    for p, place in enumerate(places, start=1):
        row = [p]
        for t, token in enumerate(tokens, start=1):
            row.append(min(table[-1][t - 1] + (token not in place), table[-1][t] + 1, row[-1] + 1))
        table.append(row)
    return table
