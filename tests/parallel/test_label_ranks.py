"""Labelling shared out to ranks: their number changes no byte, and neither does killing them, whenever it happens."""

import contextlib
import random
import shutil
import time
from pathlib import Path

import pytest

from tests.support.forked import run_ranks
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.training import RECIPE, write_pairs
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.config.schema import LabelSection
from treg_megatron.labelling.job import label
from treg_megatron.utils.shard_job import MANIFEST_NAME

KILLS = 20


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> LabelSection:
    """Twelve shards, a tiny model."""
    folder = tmp_path_factory.mktemp("label")
    tiny_llama(folder / "hf", vocab=tiny_tokenizer(folder / "hf"))
    write_pairs(folder / "pairs.jsonl", 24)
    return section(
        load_recipe(
            RECIPE,
            [
                f"model.hf={folder}/hf",
                f"label.pairs={folder}/pairs.jsonl",
                f"label.output={folder}/whole",
                "label.shard_pairs=2",
            ],
        ),
        "label",
    )


@pytest.fixture(scope="module")
def whole(job) -> dict[str, bytes]:
    """What one process writes when nobody stops it."""
    assert label(job)["pairs"] == 24
    return contents(Path(job.output))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def moved(job: LabelSection, output: Path) -> LabelSection:
    return LabelSection(**vars(job) | {"output": str(output)})


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_number_of_ranks_changes_no_byte(job, whole, ranks, tmp_path):
    manifests = run_ranks(ranks, label, moved(job, tmp_path / "labelled"))
    assert any(manifest is not None for manifest in manifests)
    assert contents(tmp_path / "labelled") == whole


@pytest.mark.parametrize("finished", [False, True], ids=["before", "after"])
def test_a_manifest_that_was_being_written_leaves_nothing_however_many_ranks_come_after(job, whole, finished, tmp_path):
    """A killed rank may find its job finished by the others, or never start again in a smaller one."""
    shutil.copytree(job.output, tmp_path / "labelled")
    if not finished:
        (tmp_path / "labelled" / MANIFEST_NAME).unlink()
    for rank in (0, 1, 6, 7):
        (tmp_path / "labelled" / f".{MANIFEST_NAME}.{rank}.partial").write_text("{", encoding="utf-8")
    run_ranks(2, label, moved(job, tmp_path / "labelled"))
    assert contents(tmp_path / "labelled") == whole


class _Kill(Exception):
    """Makes run_ranks kill its ranks."""


def test_killed_at_random_moments_it_ends_with_the_same_bytes(job, whole, tmp_path):
    output = tmp_path / "labelled"
    job, chance, kills, finished = moved(job, output), random.Random(0), 0, 0
    start = time.monotonic()
    run_ranks(2, label, job)
    seconds = time.monotonic() - start
    shutil.rmtree(output)
    while kills < KILLS:

        def kill():
            time.sleep(chance.uniform(0.2, 1) * seconds)
            if not (output / MANIFEST_NAME).exists():
                raise _Kill

        with contextlib.suppress(_Kill):
            run_ranks(2, label, job, meanwhile=kill)
            assert contents(output) == whole
            shutil.rmtree(output)
            finished += 1
            continue
        kills += 1
    run_ranks(2, label, job)
    assert contents(output) == whole
    print(f"{kills} kills, {finished} jobs finished between them")
