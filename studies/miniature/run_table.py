"""All runs of the study as CSV."""

import csv
import io

from studies.miniature.configuration import Reference, Study
from studies.miniature.measure import load_arrays
from studies.miniature.pipeline import result_path
from studies.miniature.results import Results


def all_runs(results: Results) -> str:
    """CSV of every run: mean scores, KL and credit; empty where a run of the search was not asked for it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ("reference", "method", "seed", "prompts", "settings", "score_sampled", "score_greedy", "kl", "credit")
    )
    study = results.study
    for number, reference in enumerate(results.references):
        for run in reference.search_runs:
            writer.writerow(run_row(study, reference, run.method, run.setting, run.seed, "dev"))
        for method in study.methods:
            for seed, credit in zip(study.seeds, results.credit_aurocs(method)[0][number], strict=True):
                setting = results.choices[reference.name][method]
                writer.writerow(run_row(study, reference, method, setting, seed, "test", credit))
    return text.getvalue()


def run_row(
    study: Study, reference: Reference, method: str, setting: int, seed: int, split: str, credit: float | None = None
) -> list[str]:
    """CSV row of one run."""
    result = load_arrays(result_path(reference, reference.of(method, setting, seed).name, split))
    keys = study.grids[study.methods[method]["grid"]][setting]
    return [
        reference.name,
        method,
        str(seed),
        split,
        " ".join(f"{name}={value:g}" for name, value in keys.items()),
        *(f"{result[name].mean():.4f}" if name in result else "" for name in ("sampled/score", "greedy/score", "kl")),
        "" if credit is None else f"{credit:.4f}",
    ]
