"""Report of the demo: training metrics, token rewards, and the model's answers before and after training."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from treg_megatron.config.recipe import section
from treg_megatron.config.schema import Recipe
from treg_megatron.data.labelled_pairs import read_labelled
from treg_megatron.evaluation.answer_folder import read_answers
from treg_megatron.labelling.quality.measure import compare_sources
from treg_megatron.utils.files import atomic_write

SAMPLE_PAIR = "unit-cm"


def write_report(recipe: Recipe, root: Path, seconds: dict[str, float]) -> str:
    """Write RUN/report.md and return its text.

    Args:
        root: the folder that the recipe's relative paths start from.
        seconds: duration of each step.
    """
    label, train, export = (section(recipe, name) for name in ("label", "train", "export"))
    evaluate, judge = (section(recipe, name) for name in ("evaluate", "judge"))
    records = [json.loads(line) for line in (root / train.output / "metrics.jsonl").read_text().splitlines()]
    first_step = next(r for r in records if r["step"] == 1 and "loss/preference" in r)
    validations = [r for r in records if "validation/rewards/margins" in r]
    labelled = {split: root / Path(label.output).with_name(split) for split in ("train", "heldout")}
    comparison = Path(judge.output).with_name("comparison")
    text = "\n".join(
        [
            *training_section(first_step, validations[0], validations[-1]),
            "",
            *token_reward_section(labelled),
            "",
            *source_section(labelled["heldout"], root / oracle_labels(recipe)),
            "",
            *evaluation_section(root / comparison, root / judge.baseline, root / evaluate.output),
            "",
            *step_section(seconds),
            "",
            f"The aligned model: {export.output} (transformers loads it with AutoModelForCausalLM.from_pretrained)",
            f"TensorBoard:       {train.output}/tensorboard",
            f"All answers:       {comparison}/report.html (opens in a browser)",
            "",
        ]
    )
    with atomic_write(root / recipe.run / "report.md") as partial:
        partial.write_text(text, encoding="utf-8")
    return text


def training_section(first_step: dict, before: dict, after: dict) -> Iterator[str]:
    """The first loss, and the held-out rewards before and after training."""
    yield "# T-REG demo"
    yield ""
    yield (
        f"Preference loss of the first step: {first_step['loss/preference']:.6f} "
        f"(policy and reference are the same model, so ln 2 = {math.log(2):.6f})"
    )
    yield ""
    yield f"| held-out pairs | before | after {after['step']} steps |"
    yield "|---|---:|---:|"
    losses = [record["validation/loss/preference"] for record in (before, after)]
    yield f"| preference loss | {losses[0]:.4f} | {losses[1]:.4f} |"
    margins = [round(record["validation/rewards/margins"], 4) + 0.0 for record in (before, after)]  # + 0.0: no "-0"
    yield f"| reward margin | {margins[0]:.4f} | {margins[1]:.4f} |"
    yield f"| reward accuracy | none yet | {after['validation/rewards/accuracies']:.0%} |"
    yield ""
    yield (
        "A reward is beta x (log-prob of the policy - log-prob of the reference). Before training, policy and "
        "reference are the same model: all rewards and margins are 0 up to rounding, so accuracy is meaningless."
    )


def token_reward_section(labelled: dict[str, Path]) -> Iterator[str]:
    """Mean token rewards of the chosen and the rejected responses."""
    yield "| mean token reward | chosen | rejected |"
    yield "|---|---:|---:|"
    for split, folder in labelled.items():
        chosen, rejected = (mean_token_reward(folder, side) for side in ("chosen", "rejected"))
        yield f"| {split} pairs | {chosen:+.4f} | {rejected:+.4f} |"


def oracle_labels(recipe: Recipe) -> str:
    """The folder of the held-out pairs whose token rewards are the log-ratio of a model trained by DPO."""
    return str(Path(section(recipe, "label").output).with_name("heldout_oracle"))


def source_section(contrastive: Path, oracle: Path) -> Iterator[str]:
    """The quality of two sources of token rewards on the held-out pairs."""
    sources = {"contrastive prompts": contrastive, "log-ratio of DPO": oracle}
    figures = compare_sources({name: read_labelled(folder) for name, folder in sources.items()})
    yield (
        f"Two sources of token rewards on the {figures.pairs} held-out pairs ({figures.tokens:,} response tokens): "
        "contrastive prompts, and the log-ratio of a model trained by DPO (alpha 0, four steps) to its reference."
    )
    yield ""
    yield f"| | {' | '.join(figures.rewards)} |"
    yield "|---|" + "---:|" * len(figures.rewards)
    for name, *values in figures.lines():
        if len(values) == len(figures.rewards) and name and not name.startswith(("gradient factors", "rank")):
            yield f"| {name} | {' | '.join(values)} |"
    yield ""
    [(names, correlation)] = figures.between.items()
    yield (
        f"Their correlation over the tokens is {correlation.pearson:+.2f} (by rank {correlation.spearman:+.2f}). "
        "Brackets are 95 % intervals; docs/TOKEN_REWARDS.md says how to read the figures."
    )


def mean_token_reward(folder: Path, side: str) -> float:
    """Mean over all response tokens of one side (chosen or rejected) of a labelled data set."""
    return float(np.concatenate([getattr(pair, f"{side}_token_rewards") for pair in read_labelled(folder)]).mean())


def evaluation_section(comparison: Path, before: Path, after: Path) -> Iterator[str]:
    """How often the demo's rule prefers the aligned model's answer, and one answer of both models.

    Args:
        comparison: folder of ``treg compare``.
        before, after: answers of the model before and after training.
    """
    found = json.loads((comparison / "comparison.json").read_text(encoding="utf-8"))
    [arm] = found["arms"]
    low, high = arm["win_rate_interval"]
    yield (
        f"Greedy answers to the {found['prompts']} held-out prompts: a rule that counts words (demo/judge.py) prefers "
        f"those of the aligned model to those of the original one at a rate of {arm['win_rate']:.0f} % (95 % interval "
        f"{low:.0f} to {high:.0f}; ties count half). So few prompts and so simple a rule say little about the model: "
        "they show how `treg answers`, `treg judge` and `treg compare` work."
    )
    yield ""
    prompt, *answers = answers_to(SAMPLE_PAIR, before, after)
    yield f"One of the prompts, picked because its answer changed (many do not): {prompt}"
    yield ""
    for name, answer in zip(("before", "after"), answers, strict=True):
        yield f"* {name}: {answer}"


def answers_to(prompt_id: str, *folders: Path) -> list[str]:
    """The prompt, and the answer to it in each folder, as one line each."""
    rows = [next(row for row in read_answers(folder).rows if row["prompt_id"] == prompt_id) for folder in folders]
    texts = [rows[0]["messages"][-1]["content"], *(row["answers"][-1]["text"] for row in rows)]
    return [" ".join(text.split()) for text in texts]


def step_section(seconds: dict[str, float]) -> Iterator[str]:
    """Duration of each step."""
    yield "| step | seconds |"
    yield "|---|---:|"
    for name, taken in seconds.items():
        yield f"| {name} | {taken:.0f} |"
    yield f"| total | {sum(seconds.values()):.0f} |"
