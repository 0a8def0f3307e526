"""Sections of the report that compare methods, and the words for what their differences allow to say."""

import textwrap
from collections.abc import Iterator

from studies.miniature.markdown import heading, shown, table
from studies.miniature.results import Comparison, Results

#: (better, worse, what the paper's tables say)
PAPER_ORDER = (
    ("dpo_reg", "dpo", "50.8 > 47.0"),
    ("dpo_reg", "implicit", "50.8 > 49.8"),
    ("dpo_reg", "implicit_frozen", "50.8 > 49.8"),
    ("dpo_reg", "static", "50.8 > 48.0"),
    ("dpo_reg", "dpo_sft", "50.8 > 46.0"),
    ("implicit", "dpo", "49.8 > 47.0"),
    ("implicit_frozen", "dpo", "49.8 > 47.0"),
    ("static", "dpo", "48.0 > 47.0"),
    ("dpo", "dpo_sft", "47.0 > 46.0"),
    ("simpo_reg", "simpo", "74.5 > 73.5 (Gemma-2-9B)"),
)
#: what the paper reports of token rewards "from DPO", by reading: (better, worse)
ABLATION = {
    "regularised DPO is above it": {
        "the live one": ("dpo_reg", "implicit"),
        "the frozen one": ("dpo_reg", "implicit_frozen"),
    },
    "it is above DPO": {"the live one": ("implicit", "dpo"), "the frozen one": ("implicit_frozen", "dpo")},
}
SIGNIFICANT = 0.05
SAME, OPPOSITE, UNDECIDED = "same order", "opposite order", "undecided"


def holding_section(results: Results, files: dict[str, str]) -> Iterator[str]:
    """Every method against `dpo` and `dpo_reg`, with each reference and with all."""
    yield from heading("What holds over references")
    names = [reference.name for reference in results.references]
    for other in ("dpo", "dpo_reg"):
        yield from table(
            (f"less `{other}`", *names, "all", "p, adjusted", f"than `{other}`", "credit, all"),
            [
                [
                    method,
                    *(f"{each.value:+.4f}{'*' if each.sign else ''}" for each in comparison.by_reference),
                    shown(comparison.score, 4, signed=True),
                    f"{p:.3f}",
                    verdict(comparison, p),
                    shown(comparison.credit, signed=True),
                ]
                for (method, against), (comparison, p) in results.family.items()
                if against == other
            ],
        )
        yield ""
        yield from summary(results, other)
        yield ""
    yield f"""\
Differences of mean scores of sampled answers, and of credit, with the same references, seeds and prompts on both sides.
With one reference, an interval is over its seeds and the prompts, and * marks one without 0. Over all, p-values are
bootstrapped like the intervals, and those of both tables are adjusted as one family of {len(results.family)} by Holm's
method; intervals are not adjusted. "Higher" and "lower" are verdicts at p < {SIGNIFICANT} with the same sign with every
reference. Undecided is not equal.

![difference in score to dpo of every method, over all references and with each]({files["differences"]})"""


def verdict(comparison: Comparison, p: float) -> str:
    """What can be said of a method against another, given the adjusted p-value of their difference in score."""
    if p >= SIGNIFICANT:
        return UNDECIDED
    word = "higher" if comparison.score.value > 0 else "lower"
    return word if len(set(comparison.signs)) == 1 else f"{word}, not with every reference"


def summary(results: Results, other: str) -> Iterator[str]:
    """The verdicts against one method in words."""
    said: dict[str, list[str]] = {}
    for (method, against), (comparison, p) in results.family.items():
        if against == other:
            said.setdefault(verdict(comparison, p), []).append(f"`{method}`")
    for word in ("higher", "lower"):
        yield f"* {word.capitalize()} than `{other}` with every reference: {', '.join(said.pop(word, ['none']))}."
    for word, methods in said.items():
        yield f"* {word.capitalize()}: {', '.join(methods)}."


def order_section(results: Results) -> Iterator[str]:
    """The paper's ranking compared with the measured differences."""
    yield from heading("The paper's ranking and ours")
    rows = [row for row in PAPER_ORDER if {row[0], row[1]} <= results.runs.keys()]
    found = {(better, worse): results.compare(better, worse) for better, worse, _ in rows}
    yield from table(
        (
            "in the paper",
            "its figures",
            "difference in score",
            "here",
            "with how many references",
            "difference in credit",
        ),
        [
            [
                f"{better} > {worse}",
                published,
                shown(found[better, worse].score, 4, signed=True),
                order(found[better, worse]),
                agreement(found[better, worse]),
                shown(found[better, worse].credit, signed=True),
            ]
            for better, worse, published in rows
        ],
    )
    yield """
Where the interval over references, seeds and prompts contains 0 the order is undecided; these verdicts are not adjusted. The
last column but one counts the references with a difference of the paper's sign. The paper's figures are AlpacaEval 2
length-controlled win rates of Llama-3-8B unless stated otherwise."""
    if {"implicit", "implicit_frozen"} <= results.runs.keys():
        yield "\n" + ablation(found)


def order(comparison: Comparison) -> str:
    """Whether a difference has the sign that the paper's has."""
    return {1: SAME, -1: OPPOSITE, 0: UNDECIDED}[comparison.score.sign]


def agreement(comparison: Comparison) -> str:
    """In how many references a difference is positive."""
    return f"{comparison.signs.count(1)} of {len(comparison.signs)}"


def ablation(found: dict[tuple[str, str], Comparison]) -> str:
    """What became of the paper's ablation with token rewards "from DPO", under both readings."""
    sentences = []
    for claim, pairs in ABLATION.items():
        orders = {reading: order(found[pair]) for reading, pair in pairs.items()}
        if len(set(orders.values())) == 1:
            sentences.append(f"that {claim}: {next(iter(orders.values()))} under both readings")
        else:
            sentences.append(
                f"that {claim}: " + ", ".join(f"{word} under {reading}" for reading, word in orders.items())
            )
    text = f"""\
The paper's ablation takes token rewards "from DPO" and does not say from which log-ratio: that of the policy that is being
trained (the live one, `implicit`) or that of a separate model trained by DPO (the frozen one, `implicit_frozen`). What it
reports, {"; ".join(sentences)}. Neither reading alone decides about the paper's claim."""
    return textwrap.fill(text, 120, break_on_hyphens=False)
