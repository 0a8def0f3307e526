"""What a run's folder tells about an arm: recipe, objective, checkpoint, and preference accuracy."""

import dataclasses
from pathlib import Path
from typing import Any

from treg_megatron.checkpoint.layout import newest_checkpoint
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.utils.files import read_manifest

# In a run's folder, by recipes/base.yaml.
RECIPE = Path("train") / "recipe.yaml"
ACCURACY = Path("evaluate") / "accuracy" / "accuracy.json"
_ACCURACY_FORMAT = "treg-megatron accuracy", 1


def run_records(run: Path | None) -> dict[str, Any]:
    """``run``, ``recipe``, ``checkpoint``, ``objective``, ``accuracy`` and ``kl`` of an arm, None where unknown."""
    records = dict.fromkeys(("run", "recipe", "checkpoint", "objective", "accuracy", "kl"))
    if run is None:
        return records
    records["run"] = str(run)
    if (run / RECIPE).is_file():
        objective = section(load_recipe(run / RECIPE), "objective")
        records |= {"recipe": str(run / RECIPE), "objective": dataclasses.asdict(objective)}
    checkpoint = newest_checkpoint(run / "train")
    if checkpoint:
        records["checkpoint"] = str(checkpoint)
    if (run / ACCURACY).is_file():
        records |= _of_accuracy(read_manifest(run / ACCURACY, *_ACCURACY_FORMAT))
    return records


def _of_accuracy(manifest: dict[str, Any]) -> dict[str, Any]:
    every, kl = manifest["subsets"]["all"], manifest["kl"]
    return {
        "accuracy": {
            "implicit_reward": every["implicit_reward_accuracy"],
            "log_prob": every["log_prob_accuracy"],
            "pairs": every["pairs"],
            "interval": every["implicit_reward_accuracy_interval"],
        },
        "kl": kl and {"nats_per_token": kl["nats_per_token"], "interval": kl["nats_per_token_interval"]},
    }
