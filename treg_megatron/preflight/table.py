"""Rows of the table of the shipped recipes that ``treg recipes`` prints."""

import dataclasses
import json
import re
from pathlib import Path

from treg_megatron.config import recipe_table
from treg_megatron.config.recipe import RECIPES, load_recipe
from treg_megatron.config.recipe_table import PAIRS, Row
from treg_megatron.preflight.plan import make_plan, sections_of
from treg_megatron.utils.files import atomic_write

#: recipes of no fixed model, or of the demo
LEFT_OUT = ("base", "tiny", "smollm2_135m")
DOCUMENT = RECIPES.parent / "docs" / "RECIPES.md"
PLACE = re.compile(r"(?<=<!-- table -->\n).*?(?=<!-- end of table -->)", re.DOTALL)


def names() -> list[str]:
    """The recipes that the table lists."""
    return [path.stem for path in sorted(RECIPES.glob("*.yaml")) if path.stem not in LEFT_OUT]


def row(name: str) -> Row:
    """What preflight says now about one recipe."""
    config = load_recipe(RECIPES / f"{name}.yaml")
    plan = make_plan(sections_of(config))
    data, cluster = plan.sections.data, plan.sections.cluster
    return Row(
        recipe=name,
        parameters=plan.trainable + plan.frozen,
        trained=plan.trainable,
        gpus=plan.sections.ranks,
        gpu=str(cluster.gpu),
        memory_gb=round(plan.stages[plan.fullest].total / 1e9, 1),
        gpu_memory_gb=plan.memory / 1e9,
        tokens_per_step=2 * data.global_batch_size * data.seq_length,
        bubble=round(plan.bubble, 4),
        bubble_of_short_pairs=round(plan.bubble_of_short_pairs, 4),
        seconds_per_step=round(plan.step_seconds, 2),
        hours=round(-(-PAIRS // data.global_batch_size) * plan.step_seconds / 3600, 1),
        hyper_parameters=source(name),
    )


def source(name: str) -> str:
    """Where the hyper-parameters come from, in the words of the recipe's header."""
    lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    head = " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))
    if "first of the T-REG paper" in head or "second of the T-REG paper" in head:
        return "T-REG paper"
    return (
        "adapters: common practice"
        if "common practice for adapters" in head
        else "T-REG paper's for 8-9B, not searched"
    )


def write(rows: list[Row]) -> None:
    """Write the table, the smallest model first, beside the recipes and into the documentation."""
    rows = sorted(rows, key=lambda each: (each.parameters, each.recipe))
    with atomic_write(recipe_table.TABLE) as partial:
        Path(partial).write_text(json.dumps([dataclasses.asdict(each) for each in rows], indent=1) + "\n")
    text = DOCUMENT.read_text(encoding="utf-8")
    with atomic_write(DOCUMENT) as partial:
        Path(partial).write_text(PLACE.sub(lambda _: recipe_table.as_markdown(rows) + "\n", text), encoding="utf-8")
