"""Generator of the report docs/STUDY.md; all figures and verdicts are computed from the results."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from studies.miniature import pictures
from studies.miniature.bootstrap import Bootstrap, Estimate
from studies.miniature.configuration import Study
from studies.miniature.data import WORSE
from studies.miniature.measure import load_arrays
from studies.miniature.pipeline import REFERENCE, result_path
from studies.miniature.results import Results
from studies.miniature.world import ERROR_RATES, OPERATIONS
from treg_megatron.utils.files import atomic_write

#: (better, worse, what the paper's tables say); `dpo_reg` stands for the alpha that development prompts chose
PAPER_ORDER = (
    ("dpo_reg", "dpo", "50.8 > 47.0"),
    ("dpo_reg", "implicit", "50.8 > 49.8"),
    ("dpo_reg", "static", "50.8 > 48.0"),
    ("dpo_reg", "dpo_sft", "50.8 > 46.0"),
    ("implicit", "dpo", "49.8 > 47.0"),
    ("static", "dpo", "48.0 > 47.0"),
    ("dpo", "dpo_sft", "47.0 > 46.0"),
    ("simpo_reg", "simpo", "74.5 > 73.5 (Gemma-2-9B)"),
)
EXTRA_ORDER = tuple(
    (better, worse, "not in the paper")
    for better, worse in (("truth", "dpo"), ("truth", "dpo_reg"), ("dpo", "sft"), ("dpo", "simpo"))
)
REGULARISED = ("dpo_reg_0.1", "dpo_reg_0.25", "dpo_reg_0.5")


def write_report(study: Study, choice: dict[str, int]) -> Path:
    """Write the report and, next to it, its figures; return its path."""
    results, search = Results(study, choice), search_scores(study)
    regularised = max((method for method in REGULARISED if method in search), key=lambda method: max(search[method]))
    files = pictures.draw_all(results, regularised, study.report.with_name(study.report.stem.lower()))
    lines = [
        *introduction(study),
        *reference_section(study, results),
        *method_section(study),
        *main_section(results, regularised, files),
        *order_section(results, regularised),
        *fact_section(results),
        *search_section(study, choice, search, files),
        *token_section(files),
        *limits_section(study),
        *run_section(study, results),
    ]
    with atomic_write(study.report) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return study.report


def introduction(study: Study) -> Iterator[str]:
    """Introduction with the sizes of the study."""
    world, reference = study.world, study.reference
    facts = sum(len(operation.arguments) * len(operation.items) for operation in OPERATIONS.values())
    yield f"""\
# A miniature study: does the regulariser give the right tokens the credit?

Written by `make study` from its own results; no figure was typed by hand. Real text has no token-level ground truth. The
synthetic task of [world.py](../studies/miniature/world.py) has a verifier instead: a task applies an operation (add,
convert, spell, say in a made-up language) to four items, and an answer goes through them in freely chosen words.

    add 7 : 3 9 0 5        so 3 makes 1 0 then 9 gives 1 6 next 0 makes 0 7 and 5 is 1 2

Each of {facts} facts has one popular error, which the simulated annotators make at a rate of
{", ".join(f"{rate:.0%}" for rate in ERROR_RATES)}, and fillers ("um") slip in. So a likely token need not be right, nor
an unlikely one wrong, which is what makes token rewards worth having. No two splits share a set of items; they share the
facts, which are what there is to learn. A score is 1 minus the edits to the nearest right answer, per item.

The reference, a Llama with {reference["model"]["layers"]} layers of {reference["model"]["hidden"]}, learned
{reference["examples"]} answers by the objective `sft`: half of them everyday answers, half revisions of one, "make it
better" (right) or "make it worse" ({WORSE.error_rate:.0%} of the results wrong). All runs start from it, on the same
on-policy pairs from {world["prompts"]["train"]} prompts (5 samples, the verifier's best and worst), through the steps
`sample`, `rank`, `label`, `index`, `train` and `export`. Intervals are 95 %, bootstrapped over seeds
({len(study.seeds)}) and prompts ({world["prompts"]["test"]})."""


def reference_section(study: Study, results: Results) -> Iterator[str]:
    """Whether token rewards detect wrong tokens better than plain log-probs."""
    yield from heading("Does the reference understand the two prompts?")
    yield from table(
        ("prompts", "tokens", "wrong", "AUROC of token rewards r_t", "AUROC of its plain log-prob"),
        [reference_row(study, split) for split in ("dev", "test")],
    )
    right, reward = results.credit["right"], results.credit["reward"]
    yield f"""
AUROC for separating right from wrong tokens in the reference's own ranked answers; 0.5 is chance. The mean token reward on
test prompts is {reward[right].mean():+.3f} of right tokens and {reward[~right].mean():+.3f} of wrong ones."""


def reference_row(study: Study, split: str) -> list[str]:
    """Table row of the reference's token rewards and log-probs on a split."""
    credit = load_arrays(study.run / "credit" / f"{split}.npz")
    draw = Bootstrap(1, int(credit["pair"].max()) + 1, study.measure["resamples"])
    rewards, plain = (
        shown(draw.auroc(credit[name][None], credit["right"], credit["pair"])) for name in ("reward", "ref_logp")
    )
    return [split, str(len(credit["right"])), f"{np.mean(~credit['right']):.1%}", rewards, plain]


def method_section(study: Study) -> Iterator[str]:
    """The settings of each method."""
    yield from heading("The methods")
    yield from table(
        ("method", "settings"),
        [
            [method, ", ".join(f"`{name}={value}`" for name, value in keys["settings"].items())]
            for method, keys in study.methods.items()
        ],
    )
    yield """
`dpo_sft` is the paper's ablation with SFT on the chosen response instead of the regulariser; `sft` is SFT alone.
`implicit` takes token rewards from the policy's own live log-ratio. `truth` is the upper bound: the verifier's marks (0.5
right, -0.5 wrong) instead of r_t. Learning rate and beta were chosen on development prompts, see below."""


def main_section(results: Results, regularised: str, files: dict[str, str]) -> Iterator[str]:
    """The measurements of every method."""
    yield from heading("Results on test prompts")
    columns = ("method", "score, sampled", "score, greedy", "wins, sampled", "wins, greedy", "length", "KL", "credit")
    scores = ("sampled/score", "greedy/score")
    rows = [
        [
            REFERENCE,
            *(shown(results.mean(REFERENCE, what)) for what in scores),
            "",
            "",
            shown(results.mean(REFERENCE, "sampled/length"), 1),
            "0",
            "",
        ]
    ]
    rows += [
        [
            method,
            *(shown(results.mean(method, what)) for what in scores),
            *(shown(results.wins(method, way)) for way in ("sampled", "greedy")),
            shown(results.mean(method, "sampled/length"), 1),
            shown(results.mean(method, "kl"), 2),
            shown(results.credit_auroc(method)),
        ]
        for method in results.runs
    ]
    yield from table(columns, rows)
    yield f"""
Sampled at temperature 1; length in tokens. Wins: share of answers that score above the reference's, ties counted half. KL:
from the reference, in nats per answer. Credit: AUROC of the trained model's log-ratio to the reference, token by token,
against the verifier's marks. Of the three alphas of `dpo_reg`, the development prompts selected `{regularised}`.

![learning curves]({files["curves"]})"""


def order_section(results: Results, regularised: str) -> Iterator[str]:
    """The paper's ranking compared with the measured differences."""
    yield from heading("The paper's ranking and ours")
    yield from table(
        ("in the paper", "its figures", "difference in score", "same order here?", "difference in credit"),
        [
            order_row(results, *(regularised if name == "dpo_reg" else name for name in names), published)
            for *names, published in (*PAPER_ORDER, *EXTRA_ORDER)
        ],
    )
    yield """
Differences of mean scores of sampled answers and of credit, with the same seeds and prompts on both sides; where the
interval contains 0 the two are not distinguishable. The paper's figures are AlpacaEval 2 length-controlled win rates of
Llama-3-8B unless stated otherwise.

The rows with `implicit` do not test the paper's claim. The paper does not say whether its token rewards "from DPO" are the
log-ratio of the policy that is being trained, as here, or that of a separate, frozen model trained by DPO."""


def order_row(results: Results, better: str, worse: str, published: str) -> list[str]:
    """Table row comparing two methods; ``published`` says what the paper reports."""
    score, credit = results.score_difference(better, worse), results.credit_difference(better, worse)
    verdict = "not distinguishable" if not score.excludes_zero else "yes" if score.value > 0 else "no, the opposite"
    return [f"{better} > {worse}", published, shown(score, signed=True), verdict, shown(credit, signed=True)]


def fact_section(results: Results) -> Iterator[str]:
    """Share of right results by the error rate of the facts."""
    yield from heading("Which errors disappear")
    yield from table(
        ("method", *(f"{rate:.0%} wrong" for rate in ERROR_RATES)),
        [
            [method, *(f"{results.right_results(method, rate):.3f}" for rate in ERROR_RATES)]
            for method in (REFERENCE, *results.runs)
        ],
    )
    yield """
Share of right results in sampled answers, by how many everyday answers get the fact wrong. The best and the worst of five
samples mostly share the errors of the last column: there the preference says little, and a token reward much."""


def search_scores(study: Study) -> dict[str, list[float]]:
    """Mean score of sampled answers to development prompts, by method, for each setting of its grid."""
    found: dict[str, list[float]] = {}
    for run in study.search_runs:
        result = load_arrays(result_path(study, run.name, "dev"))
        found.setdefault(run.method, []).append(float(result["sampled/score"].mean()))
    return found


def search_section(
    study: Study, choice: dict[str, int], search: dict[str, list[float]], files: dict[str, str]
) -> Iterator[str]:
    """Every run of the search."""
    yield from heading("How settings were chosen")
    yield f"""\
Each setting of each method ran once with seed {study.search_seed}; the best mean score of sampled answers to the
{study.world["prompts"]["dev"]} development prompts was recorded before any test prompt was answered. The ranges of
the grids come from a few earlier runs of `dpo` on development prompts. All runs of the search:
"""
    yield from table(
        ("method", "setting", "score on development prompts", "chosen"),
        [
            [
                method,
                ", ".join(f"{name.rpartition('.')[2]} {value:g}" for name, value in setting.items()),
                f"{search[method][number]:.4f}",
                "yes" if choice[method] == number else "",
            ]
            for method, keys in study.methods.items()
            for number, setting in enumerate(study.grids[keys["grid"]])
        ],
    )
    yield f"\n![score against distance from the reference, every run of the search]({files['search']})"


def token_section(files: dict[str, str]) -> Iterator[str]:
    """The heat map of token rewards."""
    yield from heading("What each token gets")
    yield f"""\
The reference's answers to the first test prompts with two or more wrong tokens. Blue is positive, orange is negative, each
row on its own scale; the first row is the truth, the last ones are trained policies (log-ratio, mean over seeds).

![token rewards]({files["tokens"]})"""


def limits_section(study: Study) -> Iterator[str]:
    """Limits of the study."""
    yield from heading("Limits")
    settings = len(next(iter(study.grids.values())))
    yield f"""\
* The task is synthetic: errors are popular and planted one fact at a time, and the reference was taught the two revision
  prompts. The study says what the regulariser does where contrastive prompting works, not whether it works for real
  models.
* One reference and one set of pairs; seeds change the order of the pairs. Intervals do not cover other references,
  other tasks or the choice of settings, and are not corrected for multiple comparisons.
* The same seed trains a different reference where sums are taken in a different order. With a reference trained by an
  earlier commit, which understood the two prompts less well, regularised DPO was again above DPO, implicit, static and
  SFT; the results for SimPO, for implicit against DPO and for the truth came out otherwise.
* A policy of a million parameters, one epoch, {settings} settings per method, each tried once. With its alpha, as in the
  paper, regularised DPO has had {len(REGULARISED)} times the search of plain DPO.
* alpha is at most 0.5 as in the paper, so a token's factor stays within [0.75, 1.25] and effects are bound to be small.
* The paper's win rates come from a judge and include style and length; a verifier's score does not."""


def run_section(study: Study, results: Results) -> Iterator[str]:
    """Every final run."""
    yield from heading("Every run")
    rows = [
        [
            method,
            str(seed),
            f"{run['sampled/score'].mean():.4f}",
            f"{run['greedy/score'].mean():.4f}",
            f"{run['kl'].mean():.3f}",
            f"{credit:.4f}",
        ]
        for method, runs in results.runs.items()
        for seed, run, credit in zip(study.seeds, runs, results.credit_aurocs(method)[0], strict=True)
    ]
    yield from table(("method", "seed", "score, sampled", "score, greedy", "KL", "credit"), rows)
    yield "\nTest prompts; the runs of the search are listed above."


def heading(title: str) -> Iterator[str]:
    """A section heading in Markdown."""
    yield from ("", f"## {title}", "")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table with the first column left-aligned and the others right-aligned."""
    yield f"| {' | '.join(columns)} |"
    yield f"| --- |{' ---: |' * (len(columns) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def shown(estimate: Estimate, digits: int = 3, signed: bool = False) -> str:
    """An estimate as text: 0.912 [0.905, 0.919]."""
    value, low, high = (f"{number:{'+' if signed else ''}.{digits}f}" for number in estimate)
    return f"{value} [{low}, {high}]"
