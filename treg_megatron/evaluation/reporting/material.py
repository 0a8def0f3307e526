"""What a report shows beside the comparison: the answers with their judgments, and the training curves of the runs."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treg_megatron.data.records import read_rows
from treg_megatron.errors import UserError
from treg_megatron.evaluation.answer_folder import Answers, prompt_hash, read_answers
from treg_megatron.evaluation.judgment_folder import Judgments, read_judgments

BASELINE = 0  # the baseline's place among the models; the arms follow in the order of the comparison

#: of a run's folder: where training writes its metrics
METRICS = ("train/metrics.jsonl", "metrics.jsonl")

logger = logging.getLogger(__name__)


@dataclass
class Answered:
    """One model's answer to a prompt, turn by turn.

    Attributes:
        texts: one per turn.
        tokens: of all turns; None where unknown.
        finished: False if a turn was cut off; None where unknown.
        preference: probability that it is better than the baseline's; None for the baseline, and where not judged.
        score: of a judge that scores answers one by one.
        verdicts: of a judge that reads both answers at once, one per order.
    """

    texts: list[str]
    tokens: int | None = None
    finished: bool | None = None
    preference: float | None = None
    score: float | None = None
    verdicts: list[str] = field(default_factory=list)

    @property
    def characters(self) -> int:
        """Characters of all turns."""
        return sum(map(len, self.texts))


@dataclass
class PromptAnswers:
    """A prompt, its user turns, and the answer of each model, the baseline's first; None where there is none."""

    prompt_id: str
    turns: list[str]
    category: str | None
    answers: list[Answered | None]


@dataclass
class Material:
    """Everything that a report shows beside the comparison itself.

    Attributes:
        models: names, the baseline's first.
        prompts: with answers, in the order of the benchmark; empty where no answers are at hand.
        curves: for each arm, the records of its run's metrics.jsonl, in order; empty where there is none.
    """

    models: list[str]
    prompts: list[PromptAnswers]
    curves: list[list[dict[str, float]]]

    def of_model(self, model: int) -> list[Answered]:
        """All answers of a model."""
        return [answer for prompt in self.prompts if (answer := prompt.answers[model]) is not None]


def collect(comparison: dict[str, Any]) -> Material:
    """Read what the arms of a comparison name; what is not on disk any more is left out, with a warning."""
    arms = comparison["arms"]
    models = [comparison["baseline"], *(arm["name"] for arm in arms)]
    prompts: dict[str, PromptAnswers] = {}
    for number, arm in enumerate(arms, 1):
        try:
            _add_judged(prompts, arm, number, len(models))
        except UserError as error:
            logger.warning("the report lacks the answers of %s: %s", arm["name"], error)
    curves = [training_metrics(Path(arm["run"])) if arm["run"] else [] for arm in arms]
    return Material(models, list(prompts.values()), curves)


def training_metrics(run: Path) -> list[dict[str, float]]:
    """The records of a run's metrics.jsonl; a line that is not whole is left out, as a killed run leaves one."""
    path = next((run / name for name in METRICS if (run / name).is_file()), None)
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def _add_judged(prompts: dict[str, PromptAnswers], arm: dict[str, Any], number: int, models: int) -> None:
    if arm["judgments"] is None:
        return
    path = Path(arm["judgments"])
    if path.is_file():
        _add_annotations(prompts, path, number, models)
        return
    judgments = read_judgments(path)
    answers = read_answers(judgments.arm["answers"])
    _add(prompts, answers, number, models, judgments)
    if not any(prompt.answers[BASELINE] for prompt in prompts.values()):
        _add(prompts, read_answers(judgments.baseline["answers"]), BASELINE, models, judgments)


def _add(prompts: dict[str, PromptAnswers], answers: Answers, model: int, models: int, judgments: Judgments) -> None:
    judged = {row["prompt_id"]: row for row in judgments.rows}
    for row in answers.rows:
        if row["prompt_id"] not in judged:
            continue
        turns = [message["content"] for message in row["messages"] if message["role"] == "user"]
        prompt = prompts.setdefault(
            row["prompt_id"], PromptAnswers(row["prompt_id"], turns, row.get("category"), [None] * models)
        )
        tokens = [answer["tokens"] for answer in row["answers"]]
        finished = [answer["finished"] for answer in row["answers"]]
        prompt.answers[model] = answered = Answered(
            [answer["text"] for answer in row["answers"]],
            None if None in tokens else sum(tokens),
            None if None in finished else all(finished),
        )
        judgment = judged[row["prompt_id"]]
        if model == BASELINE:
            answered.score = judgment.get("baseline_score")
        else:
            answered.preference, answered.score = judgment["preference"], judgment.get("arm_score")
            answered.verdicts = [str(order["verdict"]) for order in judgment.get("orders") or ()]


def _add_annotations(prompts: dict[str, PromptAnswers], path: Path, number: int, models: int) -> None:
    """Annotations of alpaca_eval hold both answers; Arena-Hard's judgments hold none, and add nothing."""
    for _, row in read_rows(path):
        if not isinstance(row, dict) or not {"instruction", "output_1", "output_2", "preference"} <= row.keys():
            return
        prompt_id = prompt_hash([{"role": "user", "content": row["instruction"]}])
        prompt = prompts.setdefault(
            prompt_id, PromptAnswers(prompt_id, [row["instruction"]], row.get("dataset"), [None] * models)
        )
        prompt.answers[BASELINE] = prompt.answers[BASELINE] or Answered([row["output_1"]])
        prompt.answers[number] = Answered([row["output_2"]], preference=_share(row["preference"]))


def _share(preference: float | None) -> float | None:
    """alpaca_eval's preference, 1 for the baseline to 2 for the arm and 0 for a tie, as a probability."""
    if preference is None or preference != preference:
        return None
    return preference - 1 if preference else 0.5


def values_over_steps(records: Sequence[dict[str, float]], name: str) -> list[tuple[float, float]]:
    """(step, value) of the records that have a finite value of a metric."""
    return [
        (record["step"], record[name])
        for record in records
        if isinstance(record.get(name), (int, float)) and abs(record[name]) < float("inf")
    ]
