"""Two jobs on one output: one wins, the other says who holds it, and the result is that of one job alone."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.file_operations import contents
from tests.support.two_writers import alone, contest, remove
from treg_megatron.checkpoint.from_hf import import_checkpoint
from treg_megatron.checkpoint.layout import damage
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.labelling.indexing import index
from treg_megatron.labelling.job import label

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny.yaml"
SECONDS = 0.5  # about what each command takes


@pytest.fixture(scope="module")
def commands(tiny_folder, tmp_path_factory) -> dict[str, tuple[Callable, Path]]:
    """By its name, a command, and the folder that it writes."""
    folder = tmp_path_factory.mktemp("contest")
    pairs = [
        {"pair_id": f"p{i}", "prompt": f"{i}: say", "chosen": "paris " * (1 + i % 3), "rejected": "rome " * (1 + i % 4)}
        for i in range(12)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe = load_recipe(
        RECIPE,
        [f"run={folder}", f"model.hf={tiny_folder}", f"label.pairs={folder}/pairs.jsonl", "label.shard_pairs=3"],
    )
    label(section(recipe, "label"))
    labelling, indexing = section(recipe, "label"), section(recipe, "index")
    labelling.output, indexing.output = str(folder / "contested"), str(folder / "streams" / "train")
    return {
        "import": (lambda: import_checkpoint(tiny_folder, folder / "imported"), folder / "imported"),
        "label": (lambda: label(labelling), folder / "contested"),
        "index": (lambda: index(indexing), folder / "streams"),
    }


@pytest.mark.parametrize("number", range(6))
@pytest.mark.parametrize("name", ["import", "label", "index"])
def test_one_wins(name, number, commands, tmp_path):
    command, output = commands[name]
    remove(output)
    alone(command, tmp_path / "alone.log")
    expected = contents(output)
    remove(output)
    kill = number % 3 == 2
    ended = contest(command, tmp_path, random.Random(f"{name} {number}"), SECONDS, kill)
    assert ended.complaint(kill) is None
    if name != "import" or not output.exists():
        alone(command, tmp_path / "again.log")
    found = contents(output)
    assert sorted(found) == sorted(expected) and found == expected
    assert name != "import" or damage(output) is None
