"""Measurements on test prompts, and the estimates computed from them."""

import functools
from typing import NamedTuple

import numpy as np

from studies.miniature import data
from studies.miniature.bootstrap import Bootstrap, Estimate, adjusted
from studies.miniature.configuration import Reference, Study
from studies.miniature.measure import load_arrays
from studies.miniature.pipeline import REFERENCE, credit_path, prompts_path, result_path
from studies.miniature.world import task_of


class Comparison(NamedTuple):
    """One method against another.

    Attributes:
        score, credit: differences of mean scores of sampled answers and of credit, over all references.
        by_reference: the former with each reference by itself, whose intervals are over its seeds and the prompts.
    """

    method: str
    other: str
    score: Estimate
    credit: Estimate
    by_reference: list[Estimate]

    @property
    def signs(self) -> list[int]:
        """Sign of the difference in score with each reference: 1, -1, or 0 where it is 0 up to rounding."""
        return [int(np.sign(round(each.value, 9))) for each in self.by_reference]


class Results:
    """Measurements of the final runs on test prompts, with estimates and their bootstrap intervals.

    Args:
        choices: the chosen settings by reference and method.
    """

    def __init__(self, study: Study, choices: dict[str, dict[str, int]]):
        self.study, self.references, self.choices = study, study.references, choices
        self.credit = [load_arrays(credit_path(reference, "test")) for reference in self.references]
        self.tasks = [task_of(record["prompt"]) for record in data.read_records(prompts_path(study, "test"))]
        #: by method, reference and seed; the references themselves have no seeds
        self.runs: dict[str, list[list[dict[str, np.ndarray]]]] = {
            REFERENCE: [[load_arrays(result_path(reference, REFERENCE, "test"))] for reference in self.references]
        }
        for method in study.methods:
            self.runs[method] = [
                [_final(reference, method, choices[reference.name][method], seed) for seed in study.seeds]
                for reference in self.references
            ]
        sizes = (len(study.seeds), len(self.tasks), study.measure["resamples"])
        self.draw, self.draw_within = Bootstrap(len(self.references), *sizes), Bootstrap(1, *sizes)

    def values(self, method: str, what: str) -> np.ndarray:
        """[references, seeds, prompts] values of a measure, averaged over each prompt's answers."""
        return np.array([[run[what].mean(axis=1) for run in runs] for runs in self.runs[method]])

    def mean(self, method: str, what: str) -> Estimate:
        """Mean of a measure over references, seeds and prompts."""
        return self.draw.mean(self.values(method, what))

    def wins(self, method: str, way: str) -> Estimate:
        """Share of answers that score above the reference's to the same prompt with the same seed; ties count half."""
        ours, theirs = (
            np.array([[run[f"{way}/score"] for run in runs] for runs in self.runs[name]])
            for name in (method, REFERENCE)
        )
        return self.draw.mean(((ours > theirs) + (ours == theirs) / 2).mean(axis=3))

    def right_results(self, method: str, rate: float) -> float:
        """Share of right results in sampled answers, among facts with the given error rate."""
        has_rate = np.array([[fact.error_rate == rate for fact in task.facts] for task in self.tasks])
        by_item = np.mean([run["sampled/results"].mean(axis=1) for runs in self.runs[method] for run in runs], axis=0)
        return float(by_item[has_rate].mean())

    def auroc(self, reference: int, tokens: str) -> Estimate:
        """AUROC of values of a reference's credit set for right against wrong tokens; interval over prompts."""
        value, drawn = self._aurocs(reference, tokens)
        return self.draw_within.estimate(value, drawn)

    def auroc_difference(self, reference: int, tokens: str, other: str) -> Estimate:
        """Such an AUROC less another."""
        both = zip(self._aurocs(reference, tokens), self._aurocs(reference, other))
        return self.draw_within.estimate(*(one - less for one, less in both))

    def _aurocs(self, reference: int, tokens: str) -> tuple[np.ndarray, np.ndarray]:
        credit = self.credit[reference]
        value, drawn = self.draw_within.aurocs(credit[tokens], credit["right"], credit["prompt"])
        return np.array([[value]]), drawn[None, None]

    @functools.cache  # noqa: B019  lives as long as the command
    def credit_aurocs(self, method: str) -> tuple[np.ndarray, np.ndarray]:
        """AUROCs of implicit token rewards for right against wrong tokens: [references, seeds], [..., resamples]."""
        found = [
            [self.draw.aurocs(run["implicit"], credit["right"], credit["prompt"]) for run in runs]
            for credit, runs in zip(self.credit, self.runs[method])
        ]
        return tuple(np.array([[run[part] for run in runs] for runs in found]) for part in (0, 1))

    def credit_auroc(self, method: str) -> Estimate:
        """AUROC of implicit token rewards for right against wrong tokens, mean over references and seeds."""
        return self.draw.estimate(*self.credit_aurocs(method))

    def compare(self, method: str, other: str) -> Comparison:
        """Compare two methods, paired by reference, seed and prompt."""
        scores = self.values(method, "sampled/score") - self.values(other, "sampled/score")
        credit = zip(self.credit_aurocs(method), self.credit_aurocs(other))
        return Comparison(
            method,
            other,
            self.draw.mean(scores),
            self.draw.estimate(*(ours - theirs for ours, theirs in credit)),
            [self.draw_within.mean(each[None]) for each in scores],
        )

    @functools.cached_property
    def family(self) -> dict[tuple[str, str], tuple[Comparison, float]]:
        """Every method against `dpo` and `dpo_reg`, with p-values of the scores that are adjusted as one family."""
        pairs = [
            (method, other)
            for other in ("dpo", "dpo_reg")
            for method in self.study.methods
            if method != other and (method, other) != ("dpo", "dpo_reg")  # the opposite of (dpo_reg, dpo)
        ]
        found = [self.compare(*pair) for pair in pairs]
        return dict(zip(pairs, zip(found, adjusted([each.score.p for each in found]))))


def _final(reference: Reference, method: str, setting: int, seed: int) -> dict[str, np.ndarray]:
    return load_arrays(result_path(reference, reference.of(method, setting, seed).name, "test"))
