"""Report of the demo: training metrics, token rewards, and one answer of the model before and after training."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from treg_megatron.config.recipe import section
from treg_megatron.config.schema import Recipe
from treg_megatron.data.labelled_pairs import read_labelled
from treg_megatron.utils.files import atomic_write

SAMPLE_PAIR = "unit-cm"
SAMPLE_TOKENS = 48


def write_report(recipe: Recipe, root: Path, seconds: dict[str, float]) -> str:
    """Write RUN/report.md and return its text.

    Args:
        root: the folder that the recipe's relative paths start from.
        seconds: duration of each step.
    """
    label, data, train, export = (section(recipe, name) for name in ("label", "data", "train", "export"))
    records = [json.loads(line) for line in (root / train.output / "metrics.jsonl").read_text().splitlines()]
    first_step = next(r for r in records if r["step"] == 1 and "loss/preference" in r)
    validations = [r for r in records if "validation/rewards/margins" in r]
    labelled = {split: root / Path(label.output).with_name(split) for split in ("train", "heldout")}
    conversation = sample_conversation(root / "demo" / "pairs" / "heldout.jsonl")
    text = "\n".join(
        [
            *training_section(first_step, validations[0], validations[-1]),
            "",
            *token_reward_section(labelled),
            "",
            *sample_section(conversation, root / label.model, root / export.output),
            "",
            *step_section(seconds),
            "",
            f"The aligned model: {export.output} (transformers loads it with AutoModelForCausalLM.from_pretrained)",
            f"TensorBoard:       {train.output}/tensorboard",
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


def mean_token_reward(folder: Path, side: str) -> float:
    """Mean over all response tokens of one side (chosen or rejected) of a labelled data set."""
    return float(np.concatenate([getattr(pair, f"{side}_token_rewards") for pair in read_labelled(folder)]).mean())


def sample_conversation(pairs: Path) -> list[dict[str, str]]:
    """The prompt of the pair SAMPLE_PAIR, as a list of messages."""
    records = (json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines())
    return next(record["prompt"] for record in records if record["pair_id"] == SAMPLE_PAIR)


def sample_section(conversation: list[dict[str, str]], original: Path, aligned: Path) -> Iterator[str]:
    """The greedy answers of both models to one held-out prompt."""
    yield f"One held-out prompt, picked because its answer changed (many do not): {conversation[-1]['content']}"
    yield ""
    yield f"* before: {greedy_answer(conversation, original)}"
    yield f"* after: {greedy_answer(conversation, aligned)}"


def greedy_answer(conversation: list[dict[str, str]], folder: Path) -> str:
    """Up to SAMPLE_TOKENS greedily decoded tokens of a Hugging Face model, as one line."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=SAMPLE_TOKENS, do_sample=False)
    return " ".join(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).split())


def step_section(seconds: dict[str, float]) -> Iterator[str]:
    """Duration of each step."""
    yield "| step | seconds |"
    yield "|---|---:|"
    for name, taken in seconds.items():
        yield f"| {name} | {taken:.0f} |"
    yield f"| total | {sum(seconds.values()):.0f} |"
