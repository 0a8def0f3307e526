"""docs/STUDY.md from the results: every figure in it is computed here, and whether the paper is borne out, too."""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from studies.miniature import data, pictures
from studies.miniature.bootstrap import Bootstrap, Estimate
from studies.miniature.configuration import Study
from studies.miniature.data import WORSE
from studies.miniature.measure import load_arrays
from studies.miniature.pipeline import REFERENCE, result_path
from studies.miniature.world import ERROR_RATES, OPERATIONS, task_of
from treg_megatron.files import atomic_write

#: what the paper's tables say: (better, worse, where). `dpo_reg` stands for the alpha that is chosen on development prompts
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
EXTRA_ORDER = tuple((better, worse, "not in the paper") for better, worse in
                    (("truth", "dpo"), ("truth", "dpo_reg"), ("dpo", "sft"), ("dpo", "simpo")))
REGULARISED = ("dpo_reg_0.1", "dpo_reg_0.25", "dpo_reg_0.5")


class Results:
    """The measures of the final runs on test prompts, and what is computed from them."""

    def __init__(self, study: Study, choice: dict[str, int]):
        self.study, self.choice = study, choice
        self.credit = load_arrays(study.run / "credit" / "test.npz")
        self.reference = load_arrays(result_path(study, REFERENCE, "test"))
        self.runs = {method: [load_arrays(result_path(study, study.of(method, choice[method], seed).name, "test"))
                              for seed in study.seeds] for method in study.methods}
        self.tasks = [task_of(row["prompt"]) for row in data.read_rows(study.run / "prompts" / "test.jsonl")]
        resamples = study.measure["resamples"]
        self.draw = Bootstrap(len(study.seeds), len(self.tasks), resamples)
        self.draw_pairs = Bootstrap(len(study.seeds), int(self.credit["pair"].max()) + 1, resamples)

    def values(self, method: str, what: str) -> np.ndarray:
        """[seeds, prompts] of a measure, the mean over a prompt's sampled answers; of the reference, one row."""
        runs = [self.reference] if method == REFERENCE else self.runs[method]
        return np.stack([run[what].reshape(len(self.tasks), -1).mean(axis=1) for run in runs])

    def wins(self, method: str, way: str) -> np.ndarray:
        """[seeds, prompts] share of answers that score above the reference's to the same prompt and seed, ties half."""
        theirs = self.reference[f"{way}/score"]
        ours = np.stack([run[f"{way}/score"] for run in self.runs[method]])
        return ((ours > theirs) + (ours == theirs) / 2).mean(axis=2)

    def right_results(self, method: str, rate: float) -> float:
        """Share of right results in sampled answers, among the facts of one error rate."""
        runs = [self.reference] if method == REFERENCE else self.runs[method]
        by_item = np.mean([run["sampled/results"].mean(axis=1) for run in runs], axis=0)       # [prompts, items]
        return float(by_item[self.has_rate(rate)].mean())

    def has_rate(self, rate: float) -> np.ndarray:
        """[prompts, items] bool: facts of that error rate."""
        return np.array([[fact.error_rate == rate for fact in task.facts] for task in self.tasks])

    @functools.cache
    def credit_aurocs(self, method: str) -> tuple[np.ndarray, np.ndarray]:
        """How well implicit token rewards tell right tokens from wrong ones, by seed and by draw."""
        implicit = np.stack([run["implicit"] for run in self.runs[method]])
        return self.draw_pairs.aurocs(implicit, self.credit["right"], self.credit["pair"])

    def credit_auroc(self, method: str) -> Estimate:
        return self.draw_pairs.estimate(*self.credit_aurocs(method))

    def credit_difference(self, better: str, worse: str) -> Estimate:
        return self.draw_pairs.estimate(*(a - b for a, b in zip(self.credit_aurocs(better), self.credit_aurocs(worse))))

    def difference(self, better: str, worse: str, what: str = "sampled/score") -> Estimate:
        return self.draw.mean(self.values(better, what) - self.values(worse, what))


def write_report(study: Study, choice: dict[str, int]) -> Path:
    """Write the report and its pictures beside it; returns its path."""
    results, search = Results(study, choice), search_scores(study)
    regularised = max((m for m in REGULARISED if m in study.methods), key=lambda method: max(search[method]))
    files = pictures.draw_all(results, regularised, study.report.with_name(study.report.stem.lower()))
    text = "\n".join([*introduction(study), *reference_section(study, results), *method_section(study), *main_section(results, regularised, files),
                      *order_section(results, regularised), *fact_section(results), *search_section(study, choice, search, files),
                      *picture_section(files), *limits_section(), *run_section(study, results)]) + "\n"
    with atomic_write(study.report) as partial:
        partial.write_text(text, encoding="utf-8")
    return study.report


def introduction(study: Study) -> Iterator[str]:
    world, reference = study.world, study.reference
    yield from f"""\
# A miniature study: does the regulariser give the right tokens the credit?

Written by `make study` from its own results; no figure in it was typed. Nobody knows which tokens of real text are right.
In the made world of [studies/miniature/world.py](../studies/miniature/world.py) a verifier does: a task applies an operation
(add, convert, spell, say in a made-up language) to four items, and the answer goes through them with freely chosen words.

    add 7 : 3 9 0 5        so 3 makes 1 0 then 9 gives 1 6 next 0 makes 0 7 and 5 is 1 2

Each of {fact_count()} facts has one popular error, which people who answer fall for at a rate of \
{", ".join(f"{rate:.0%}" for rate in ERROR_RATES)}, and fillers ("um") slip in. So neither a likely token is right nor an
unlikely one wrong: this is what makes token rewards worth having. No two of the splits share a set of items; facts are
shared, because they are what there is to learn. A score is 1 minus edits to the nearest right answer, per place.

The reference, a Llama with {reference["model"]["layers"]} layers of {reference["model"]["hidden"]}, learned {reference["examples"]} \
answers by the objective `sft`: half everyday answers, half revisions of one, "make it better" (right) or "make it worse" \
({WORSE.error_rate:.0%} of results wrong). All runs start from it, on the same on-policy pairs of {world["prompts"]["train"]} prompts
(5 samples, the verifier's best and worst), through the stations `sample`, `rank`, `label`, `index`, `train` and `export`.
Intervals are 95 %, bootstrapped over seeds ({len(study.seeds)}) and prompts ({world["prompts"]["test"]}).
""".splitlines()


def reference_section(study: Study, results: Results) -> Iterator[str]:
    yield from ["", "## Does the reference understand the two prompts?", "",
                "AUROC of telling right from wrong tokens of its own ranked answers; 0.5 is chance.", "",
                "| prompts | tokens | wrong | token rewards r_t | plain log-prob (surprisal) |", "| --- | ---: | ---: | ---: | ---: |"]
    for split in ("dev", "test"):
        credit = load_arrays(study.run / "credit" / f"{split}.npz")
        draw = Bootstrap(1, int(credit["pair"].max()) + 1, study.measure["resamples"])
        rewards, plain = (draw.auroc(credit[name][None], credit["right"], credit["pair"]) for name in ("reward", "ref_logp"))
        yield (f"| {split} | {len(credit['right'])} | {np.mean(~credit['right']):.1%} | {shown(rewards)} | {shown(plain)} |")
    right = results.credit["right"]
    yield ""
    yield (f"Mean token reward on test prompts: {results.credit['reward'][right].mean():+.3f} of right tokens, "
           f"{results.credit['reward'][~right].mean():+.3f} of wrong ones.")


def main_section(results: Results, regularised: str, files: dict[str, str]) -> Iterator[str]:
    yield from ["", "## What the methods reach on test prompts", "",
                "Sampled at temperature 1. Win rate: answers that score above the reference's, ties half. Credit: AUROC of the",
                "trained model's log-ratio to the reference, token by token, against the verifier's marks.", "",
                "| method | score, sampled | score, greedy | wins, sampled | wins, greedy | length | KL | credit |",
                "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]
    mean, values = results.draw.mean, results.values
    yield (f"| reference | {shown(mean(values(REFERENCE, 'sampled/score')))} | {shown(mean(values(REFERENCE, 'greedy/score')))} "
           f"| | | {values(REFERENCE, 'sampled/length').mean():.1f} | 0 | |")
    for method in results.runs:
        cells = [shown(mean(values(method, "sampled/score"))), shown(mean(values(method, "greedy/score"))),
                 shown(mean(results.wins(method, "sampled"))), shown(mean(results.wins(method, "greedy"))),
                 shown(mean(values(method, "sampled/length")), 1), shown(mean(values(method, "kl")), 2),
                 shown(results.credit_auroc(method))]
        yield f"| {method} | {' | '.join(cells)} |"
    yield from ["", f"Of the three alphas of `dpo_reg`, development prompts chose `{regularised}`.", "",
                f"![learning curves]({files['curves']})"]


def order_section(results: Results, regularised: str) -> Iterator[str]:
    yield from ["", "## The paper's order and ours", "",
                "Differences of mean scores of sampled answers and of credit, the same seeds and prompts on both sides. The paper's",
                "figures are AlpacaEval 2 length-controlled win rates, of Llama-3-8B where nothing else is said.", "",
                "| the paper says | its figures | difference in score | borne out? | difference in credit |",
                "| --- | --- | ---: | --- | ---: |"]
    for better, worse, figures in (*PAPER_ORDER, *EXTRA_ORDER):
        ours = [regularised if name == "dpo_reg" else name for name in (better, worse)]
        score, credit = results.difference(*ours), results.credit_difference(*ours)
        verdict = "not told apart" if not score.excludes_zero else "yes" if score.value > 0 else "no, the opposite"
        yield (f"| {' > '.join(ours)} | {figures} | {shown(score, signed=True)} | {verdict} "
               f"| {shown(credit, signed=True)} |")


def fact_section(results: Results) -> Iterator[str]:
    yield from ["", "## Which errors go away", "",
                "Share of results that are right in sampled answers, by how many everyday answers get the fact wrong. Best and worst of",
                "five samples mostly share the errors of the last column, and on those a pair's preference says little.", "",
                f"| method | {' | '.join(f'{rate:.0%} wrong' for rate in ERROR_RATES)} |", "| --- | ---: | ---: | ---: |"]
    for method in (REFERENCE, *results.runs):
        yield f"| {method} | {' | '.join(f'{results.right_results(method, rate):.3f}' for rate in ERROR_RATES)} |"


def method_section(study: Study) -> Iterator[str]:
    yield from ["", "## The methods", "", "What each sets beside the recipe; `dpo` is what nothing else is said of. `truth` trains on the verifier's marks",
                "(0.5 right, -0.5 wrong) in the place of r_t and is the upper bound. The rest is chosen on development prompts, see below.", "",
                "| method | settings |", "| --- | --- |"]
    for method, of in study.methods.items():
        yield f"| {method} | {', '.join(f'`{name}={value}`' for name, value in of['settings'].items())} |"


def search_scores(study: Study) -> dict[str, list[float]]:
    """Method -> mean score of sampled answers to development prompts, of each setting of its grid."""
    found: dict[str, list[float]] = {}
    for run in study.search_runs:
        found.setdefault(run.method, []).append(
            float(load_arrays(result_path(study, run.name, "dev"))["sampled/score"].mean()))
    return found


def search_section(study: Study, choice: dict[str, int], search: dict[str, list[float]],
                   files: dict[str, str]) -> Iterator[str]:
    yield from ["", "## How settings were chosen", "",
                f"Each setting of each method ran once with seed {study.search_seed}; the best mean score of sampled answers to the",
                f"{study.world['prompts']['dev']} development prompts was written down before a test prompt was answered. All search runs:", "",
                "| method | setting | score on development prompts | chosen |", "| --- | --- | ---: | --- |"]
    for method, of in study.methods.items():
        for number, setting in enumerate(study.grids[of["grid"]]):
            named = ", ".join(f"{name.split('.')[-1]} {value:g}" for name, value in setting.items())
            yield f"| {method} | {named} | {search[method][number]:.4f} | {'yes' if choice[method] == number else ''} |"
    yield from ["", "Score against distance from the reference, every search run:", "", f"![score and KL]({files['search']})"]


def picture_section(files: dict[str, str]) -> Iterator[str]:
    yield from ["", "## What tokens get", "",
                "Answers of the reference to test prompts, the first with at least two wrong results. Blue is up, orange is down; the",
                "first row is the truth.", "", f"![token rewards]({files['tokens']})"]


def limits_section() -> Iterator[str]:
    yield from """
## Limits

* The world is made: errors are popular and planted one fact at a time, and the reference was taught the two revision prompts.
  The study says what the regulariser does where contrastive prompting works, not whether it works on real models.
* One reference and one set of pairs; seeds change the order of the pairs. Intervals do not cover other references or worlds.
* A policy of a million parameters, 5 samples, one epoch, a few settings a method: small effects of the settings remain.
* alpha is at most 0.5 as in the paper, so a token's factor stays within [0.75, 1.25]: effects are bound to be small.""".splitlines()


def run_section(study: Study, results: Results) -> Iterator[str]:
    yield from ["", "## Every run", "", "Final runs, test prompts; search runs stand above.", "",
                "| method | seed | score, sampled | score, greedy | KL | credit |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for method, runs in results.runs.items():
        for seed, run, credit in zip(study.seeds, runs, results.credit_aurocs(method)[0], strict=True):
            yield (f"| {method} | {seed} | {run['sampled/score'].mean():.4f} | {run['greedy/score'].mean():.4f} "
                   f"| {run['kl'].mean():.3f} | {credit:.4f} |")


def fact_count() -> int:
    return sum(len(operation.arguments) * len(operation.items) for operation in OPERATIONS.values())


def shown(estimate: Estimate, digits: int = 3, signed: bool = False) -> str:
    """0.912 [0.905, 0.919]"""
    sign = "+" if signed else ""
    value, low, high = (f"{number:{sign}.{digits}f}" for number in estimate)
    return f"{value} [{low}, {high}]"
