"""Measurements on test prompts, and the estimates computed from them."""

import functools

import numpy as np

from studies.miniature import data
from studies.miniature.bootstrap import Bootstrap, Estimate
from studies.miniature.configuration import Study
from studies.miniature.measure import load_arrays
from studies.miniature.pipeline import REFERENCE, result_path
from studies.miniature.world import task_of


class Results:
    """Measurements of the final runs on test prompts, with estimates and their bootstrap intervals."""

    def __init__(self, study: Study, choice: dict[str, int]):
        self.study = study
        self.credit = load_arrays(study.run / "credit" / "test.npz")
        self.reference = load_arrays(result_path(study, REFERENCE, "test"))
        self.runs = {
            method: [
                load_arrays(result_path(study, study.of(method, choice[method], seed).name, "test"))
                for seed in study.seeds
            ]
            for method in study.methods
        }
        self.tasks = [task_of(record["prompt"]) for record in data.read_records(study.run / "prompts" / "test.jsonl")]
        resamples = study.measure["resamples"]
        self.draw = Bootstrap(len(study.seeds), len(self.tasks), resamples)
        self.draw_pairs = Bootstrap(len(study.seeds), int(self.credit["pair"].max()) + 1, resamples)

    def of(self, method: str) -> list[dict[str, np.ndarray]]:
        """Measurements of a method, one entry per seed; one entry for the reference, which has no seeds."""
        return [self.reference] if method == REFERENCE else self.runs[method]

    def values(self, method: str, what: str) -> np.ndarray:
        """[seeds, prompts] values of a measure, averaged over each prompt's answers."""
        return np.stack([run[what].mean(axis=1) for run in self.of(method)])

    def mean(self, method: str, what: str) -> Estimate:
        """Mean of a measure over seeds and prompts."""
        return self.draw.mean(self.values(method, what))

    def wins(self, method: str, way: str) -> Estimate:
        """Share of answers that score above the reference's to the same prompt with the same seed; ties count half."""
        theirs = self.reference[f"{way}/score"]
        ours = np.stack([run[f"{way}/score"] for run in self.runs[method]])
        return self.draw.mean(((ours > theirs) + (ours == theirs) / 2).mean(axis=2))

    def score_difference(self, better: str, worse: str) -> Estimate:
        """Mean score of sampled answers of one method minus that of another, paired by seed and prompt."""
        return self.draw.mean(self.values(better, "sampled/score") - self.values(worse, "sampled/score"))

    def right_results(self, method: str, rate: float) -> float:
        """Share of right results in sampled answers, among facts with the given error rate."""
        has_rate = np.array([[fact.error_rate == rate for fact in task.facts] for task in self.tasks])
        by_item = np.mean([run["sampled/results"].mean(axis=1) for run in self.of(method)], axis=0)
        return float(by_item[has_rate].mean())

    @functools.cache  # noqa: B019  lives as long as the command
    def credit_aurocs(self, method: str) -> tuple[np.ndarray, np.ndarray]:
        """AUROCs of implicit token rewards for right against wrong tokens: [seeds], and [seeds, resamples]."""
        implicit = np.stack([run["implicit"] for run in self.runs[method]])
        return self.draw_pairs.aurocs(implicit, self.credit["right"], self.credit["pair"])

    def credit_auroc(self, method: str) -> Estimate:
        """AUROC of implicit token rewards for right against wrong tokens, mean over seeds."""
        return self.draw_pairs.estimate(*self.credit_aurocs(method))

    def credit_difference(self, better: str, worse: str) -> Estimate:
        """Credit AUROC of one method minus that of another, on the same draws."""
        both = zip(self.credit_aurocs(better), self.credit_aurocs(worse), strict=True)
        return self.draw_pairs.estimate(*(ours - theirs for ours, theirs in both))
