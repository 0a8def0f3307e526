"""Generator of the report docs/STUDY.md; all figures and verdicts are computed from the results."""

from collections.abc import Iterator
from pathlib import Path

from studies.miniature import pictures
from studies.miniature.configuration import FORMS, Reference, Study, streams_of
from studies.miniature.data import WORSE
from studies.miniature.markdown import heading, shown, table
from studies.miniature.measure import load_arrays
from studies.miniature.pipeline import ORACLE, REFERENCE, result_path
from studies.miniature.results import Results
from studies.miniature.run_table import all_runs
from studies.miniature.verdicts import holding_section, order_section
from studies.miniature.world import ERROR_RATES, OPERATIONS
from treg_megatron.utils.files import atomic_write

#: where token rewards come from, if not from the reference's answers to the two requests
LABELS = {"train": "", "truth": ", token rewards by the verifier", ORACLE: ", token rewards by the frozen policy"}


def write_report(study: Study, choices: dict[str, dict[str, int]]) -> Path:
    """Write the report and, next to it, its figures and a table of all runs; return its path."""
    results, folder = Results(study, choices), study.report.with_name(study.report.stem.lower())
    files = pictures.draw_all(results, folder)
    lines = [
        *introduction(study),
        *reference_section(results),
        *method_section(study),
        *main_section(results, files),
        *holding_section(results, files),
        *order_section(results),
        *fact_section(results),
        *search_section(study, choices, files),
        *token_section(results, files),
        *limits_section(results),
        *run_section(folder),
    ]
    with atomic_write(folder / "runs.csv") as partial:
        partial.write_text(all_runs(results), encoding="utf-8")
    with atomic_write(study.report) as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return study.report


def introduction(study: Study) -> Iterator[str]:
    """Introduction with the sizes of the study."""
    world, training = study.world, study.training
    facts = sum(len(operation.arguments) * len(operation.items) for operation in OPERATIONS.values())
    yield f"""\
# A miniature study: does the regulariser give the right tokens the credit?

Second edition: {len(study.models)} references, {len(study.methods)} methods. Written by `make study` from its own
results; no figure was typed by hand. Real text has no token-level ground truth. The synthetic task of
[world.py](../studies/miniature/world.py) has a verifier instead: a task applies an operation (add, convert, spell, say
in a made-up language) to four items, and an answer goes through them in freely chosen words.

    add 7 : 3 9 0 5        so 3 makes 1 0 then 9 gives 1 6 next 0 makes 0 7 and 5 is 1 2

Each of {facts} facts has one popular error, which the simulated annotators make at a rate of
{", ".join(f"{rate:.0%}" for rate in ERROR_RATES)}, and fillers ("um") slip in. So a likely token need not be right, nor
an unlikely one wrong, which is what makes token rewards worth having. No two splits share a set of items; they share the
facts, which are what there is to learn. A score is 1 minus the edits to the nearest right answer, per item.

A reference is a Llama trained from scratch on {training["examples"]} answers by the objective `sft`: half of them everyday
answers, half revisions of one, "make it better" (right) or "make it worse" ({WORSE.error_rate:.0%} of the results wrong).
References differ in their size or in the seed of their weights and training data. From each reference all methods start,
on the same on-policy pairs from {world["prompts"]["train"]} prompts (5 samples, the verifier's best and worst), through
the steps `sample`, `rank`, `label`, `index`, `train` and `export`. Intervals are 95 %, from a hierarchical bootstrap over
references ({len(study.models)}), seeds ({len(study.seeds)} for each) and prompts ({world["prompts"]["test"]}, the same
for all)."""


def reference_section(results: Results) -> Iterator[str]:
    """Whether token rewards detect wrong tokens better than plain log-probs, by each form of the request."""
    yield from heading("Do the references understand the two requests?")
    yield from table(
        ("reference", "layers x width", "score", "tokens", "wrong", *(f"`{form}`" for form in FORMS), "plain log-prob"),
        [reference_row(results, number, reference) for number, reference in enumerate(results.references)],
    )
    first, other = FORMS
    yield f"""
The last columns are AUROCs for separating right from wrong tokens in the reference's own ranked answers to test prompts,
by token rewards r_t of either form of the request and by the reference's own log-prob; 0.5 is chance. In
[`{first}`](../studies/miniature/{first}.yaml) the request is a further turn of the conversation, in
[`{other}`](../studies/miniature/{other}.yaml) everything is in one turn. The references learned both, each from half of the
revisions. The methods use `{first}`.
"""
    yield from table(
        ("reference", "mean r_t, right tokens", "wrong tokens", f"AUROC of `{first}` less that of `{other}`"),
        [reward_row(results, number, reference) for number, reference in enumerate(results.references)],
    )


def reference_row(results: Results, number: int, reference: Reference) -> list[str]:
    """Table row of a reference's token rewards and log-probs on test prompts."""
    credit, shape = results.credit[number], results.study.models[reference.name]
    return [
        reference.name,
        f"{shape['layers']} x {shape['hidden']}",
        f"{results.values(REFERENCE, 'sampled/score')[number].mean():.3f}",
        str(len(credit["right"])),
        f"{(~credit['right']).mean():.1%}",
        *(shown(results.auroc(number, name)) for name in (*(f"reward/{form}" for form in FORMS), "ref_logp")),
    ]


def reward_row(results: Results, number: int, reference: Reference) -> list[str]:
    """Table row of a reference's mean token rewards, and of the difference between the two forms of the request."""
    credit = results.credit[number]
    right, reward = credit["right"], credit[f"reward/{FORMS[0]}"]
    difference = results.auroc_difference(number, *(f"reward/{form}" for form in FORMS))
    return [
        reference.name,
        f"{reward[right].mean():+.3f}",
        f"{reward[~right].mean():+.3f}",
        shown(difference, signed=True),
    ]


def method_section(study: Study) -> Iterator[str]:
    """The settings of each method."""
    yield from heading("The methods")
    yield from table(
        ("method", "settings"),
        [
            [
                method,
                ", ".join(f"`{name.removeprefix('objective.')}={value}`" for name, value in keys["settings"].items())
                + LABELS[streams_of(keys)],
            ]
            for method, keys in study.methods.items()
        ],
    )
    yield """
All are settings of `objective` ([METHOD.md](METHOD.md)). `dpo_sft` is the paper's ablation with SFT on the chosen response
instead of the regulariser; `sft` is SFT alone. `implicit` takes token rewards from the policy's own live log-ratio,
`implicit_frozen` from that of a frozen model, the best run of `dpo` from the same reference (`label.source=model_ratio`).
`truth` is the upper bound: the verifier's marks (0.5 right, -0.5 wrong) instead of r_t. alpha is the best of the paper's
three in the first edition. Learning rate and beta were chosen on development prompts, see below."""


def main_section(results: Results, files: dict[str, str]) -> Iterator[str]:
    """The measurements of every method."""
    yield from heading("Results on test prompts")
    columns = ("method", "score, sampled", "score, greedy", "wins, sampled", "length", "KL", "credit")
    rows = []
    for method in results.runs:
        trained = method != REFERENCE
        rows.append(
            [
                method,
                *(shown(results.mean(method, what)) for what in ("sampled/score", "greedy/score")),
                shown(results.wins(method, "sampled")) if trained else "",
                shown(results.mean(method, "sampled/length"), 1),
                shown(results.mean(method, "kl"), 2) if trained else "0",
                shown(results.credit_auroc(method)) if trained else "",
            ]
        )
    yield from table(columns, rows)
    yield f"""
Means over all references. Sampled at temperature 1; length in tokens. Wins: share of answers that score above the
reference's, ties counted half. KL: from the reference, in nats per answer. Credit: AUROC of the trained model's log-ratio
to the reference, token by token, against the verifier's marks.

![learning curves with {results.references[0].name}]({files["curves"]})"""


def fact_section(results: Results) -> Iterator[str]:
    """Share of right results by the error rate of the facts."""
    yield from heading("Which errors disappear")
    yield from table(
        ("method", *(f"{rate:.0%} wrong" for rate in ERROR_RATES)),
        [[method, *(f"{results.right_results(method, rate):.3f}" for rate in ERROR_RATES)] for method in results.runs],
    )
    yield """
Share of right results in sampled answers over all references, by how many everyday answers get the fact wrong. The best and
the worst of five samples mostly share the errors of the last column: there the preference says little, and a token reward
much."""


def search_section(study: Study, choices: dict[str, dict[str, int]], files: dict[str, str]) -> Iterator[str]:
    """The chosen settings."""
    yield from heading("How settings were chosen")
    settings = len(next(iter(study.grids.values())))
    yield f"""\
Each of {settings} settings of each method ran once with each reference, with seed {study.search_seed}; the best mean score of
sampled answers to the {study.world["prompts"]["dev"]} development prompts was recorded before any test prompt was answered.
The ranges of the grids come from the first edition. Chosen, with that score:
"""
    yield from table(
        ("method", *study.models),
        [
            [method, *(chosen(reference, method, choices[reference.name][method]) for reference in study.references)]
            for method in study.methods
        ],
    )
    yield f"\n![score against distance from the reference, runs of the search]({files['search']})"


def chosen(reference: Reference, method: str, setting: int) -> str:
    """A chosen setting and its score on development prompts."""
    study = reference.study
    keys = study.grids[study.methods[method]["grid"]][setting]
    named = ", ".join(f"{name.rpartition('.')[2]} {value:g}" for name, value in keys.items())
    result = load_arrays(result_path(reference, reference.of(method, setting, study.search_seed).name, "dev"))
    return f"{named}: {result['sampled/score'].mean():.4f}"


def token_section(results: Results, files: dict[str, str]) -> Iterator[str]:
    """The heat map of token rewards."""
    yield from heading("What each token gets")
    yield f"""\
The answers of {results.references[0].name} to the first test prompts with two or more wrong tokens. Blue is positive, orange
is negative, each row on its own scale; the first row is the truth, the last ones are trained policies (log-ratio, mean over
seeds).

![token rewards]({files["tokens"]})"""


def limits_section(results: Results) -> Iterator[str]:
    """Limits of the study."""
    study = results.study
    yield from heading("Limits")
    references, settings = len(study.models), len(next(iter(study.grids.values())))
    yield f"""\
* The task is synthetic: errors are popular and planted one fact at a time, and the references were taught the two revision
  requests. The study says what the regulariser does where contrastive prompting works, not whether it works for real
  models.
* {references} references are few: a bootstrap over them is rough and its intervals too narrow (its variance between references is
  {references - 1}/{references} of what it should be), and {references} equal signs come about by chance once in {2 ** (references - 1)}. They share
  the task, its verifier and the prompts.
* Policies of up to a million parameters, one epoch, {settings} settings per method, each tried once. Intervals do not cover the
  choice of settings. alpha and the constants of the other rules were not searched.
* The rules inside the margin read the reference's contrastive token rewards, also where their papers take them from other
  models (TGDPO, SePO).
* alpha is at most 0.5 as in the paper, so a token's factor stays within [0.75, 1.25] and effects are bound to be small.
* The paper's win rates come from a judge and include style and length; a verifier's score does not."""


def run_section(folder: Path) -> Iterator[str]:
    """Where every run is listed."""
    yield from heading("Every run")
    yield f"[{folder.name}/runs.csv]({folder.name}/runs.csv) lists all runs of the search and all final runs."
