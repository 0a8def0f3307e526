"""The stored table of recipes, and rules that every recipe for GPUs keeps; nothing is built."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.published import PUBLISHED
from treg_megatron.config import recipe_table
from treg_megatron.config.recipe import RECIPES, load_recipe, section, summaries

pytestmark = pytest.mark.slow

ROWS = {row.recipe: row for row in recipe_table.read()}
NAMES = sorted(set(summaries()) - {"base", "tiny", "smollm2_135m"})


def test_every_recipe_is_in_the_table():
    assert sorted(ROWS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_fits_its_gpus_and_keeps_its_stages_busy(name):
    row = ROWS[name]
    assert row.memory_gb <= row.gpu_memory_gb
    assert row.bubble < 0.1
    model = name.removesuffix("_lora")
    assert row.parameters == PUBLISHED[model] if model == name else row.parameters - row.trained == PUBLISHED[model]


@pytest.mark.parametrize("name", NAMES)
def test_a_micro_batch_has_enough_rows_or_the_recipe_says_why_not(name):
    recipe = load_recipe(name and RECIPES / f"{name}.yaml")
    data, parallel = section(recipe, "data"), section(recipe, "parallel")
    rows = data.tokens_of_a_bin // parallel.context if data.layout == "bins" else 0
    assert rows >= 4096 or f"{rows:,} rows" in (RECIPES / f"{name}.yaml").read_text()


def test_the_documentation_shows_the_table():
    text = (Path(__file__).parents[2] / "docs" / "RECIPES.md").read_text()
    assert recipe_table.as_markdown(list(ROWS.values())) in text, "make recipes-table"


@pytest.mark.slow
def test_the_command_prints_it():
    done = subprocess.run([sys.executable, "-m", "treg_megatron", "recipes"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + len(ROWS) + 1 + len(recipe_table.NOTE.splitlines())
    assert any(line.startswith("llama3_8b ") and "8.03B" in line and "T-REG paper" in line for line in lines)
