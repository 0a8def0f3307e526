"""One warm process for all parallel tests: NeMo is imported here, once; ranks are forked from it."""

import json
import os
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

from tests.support.forked import warm_up  # noqa: E402
from tests.support.tiny import tiny_llama, tiny_pair, tiny_tokenizer  # noqa: E402

warm_up()

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny.yaml"


class TinyRun(NamedTuple):
    """Everything that training needs, made by the stations from a random model and made-up pairs."""

    recipe: Path
    hf: Path
    overrides: list[str]

    def sections(self, output: Path, *overrides: str) -> list[str]:
        return [*self.overrides, f"train.output={output}", *overrides]


def write_pairs(path: Path, count: int) -> None:
    """Pairs of different lengths, the same at every call."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            file.write(json.dumps(tiny_pair(i, f"{path.stem}-{i}")) + "\n")


def make_run(folder: Path, tied: bool) -> TinyRun:
    from treg_megatron.checkpoint.from_hf import import_checkpoint
    from treg_megatron.config.recipe import load_recipe, section
    from treg_megatron.labelling.indexing import index
    from treg_megatron.labelling.job import label

    hf = folder / "hf"
    vocab = tiny_tokenizer(hf)
    tiny_llama(hf, layers=4, vocab=vocab, tied=tied)
    overrides = [f"run={folder}", f"model.hf={hf}", f"data.validation={folder}/streams/heldout"]
    for name, count in (("train", 22), ("heldout", 7)):
        write_pairs(folder / f"{name}.jsonl", count)
        recipe = load_recipe(
            RECIPE,
            [
                *overrides,
                f"label.pairs={folder}/{name}.jsonl",
                f"label.output={folder}/labelled/{name}",
                f"index.output={folder}/streams/{name}",
            ],
        )
        label(section(recipe, "label"))
        index(section(recipe, "index"))
    import_checkpoint(hf, folder / "megatron")
    return TinyRun(RECIPE, hf, [*overrides, f"index.output={folder}/streams/train"])


@pytest.fixture(scope="session")
def tied_run(tmp_path_factory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied_run(tmp_path_factory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("untied"), tied=False)
