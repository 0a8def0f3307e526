"""Labelling split over ranks: neither their number nor killing them at any time changes a byte of the output."""

import contextlib
import json
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from tests.support.file_operations import contents
from tests.support.forked import TIMEOUT_SECONDS, run_ranks
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.training import RECIPE, write_pairs
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.config.schema import LabelSection
from treg_megatron.labelling.job import label
from treg_megatron.utils.lock import Lock
from treg_megatron.utils.shard_job import MANIFEST_NAME

STARTS, FEWEST_KILLS = 24, 15  # a start with too little left to do ends before its kill


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> LabelSection:
    """A labelling job with a tiny model and twelve shards."""
    folder = tmp_path_factory.mktemp("label")
    tiny_llama(folder / "hf", vocab=tiny_tokenizer(folder / "hf"))
    write_pairs(folder / "pairs.jsonl", 24)
    return section(
        load_recipe(
            RECIPE,
            [
                f"model.hf={folder}/hf",
                f"label.pairs={folder}/pairs.jsonl",
                f"label.output={folder}/uninterrupted",
                "label.shard_pairs=2",
            ],
        ),
        "label",
    )


@pytest.fixture(scope="module")
def uninterrupted(job) -> dict[str, bytes]:
    """Output of one uninterrupted process."""
    assert label(job)["pairs"] == 24
    return contents(Path(job.output))


def moved(job: LabelSection, output: Path) -> LabelSection:
    return LabelSection(**vars(job) | {"output": str(output)})


@pytest.mark.parametrize("ranks", [2, 3])
def test_output_does_not_depend_on_the_number_of_ranks(job, uninterrupted, ranks, tmp_path):
    manifests = run_ranks(ranks, label, moved(job, tmp_path / "labelled"))
    assert any(manifest is not None for manifest in manifests)
    assert contents(tmp_path / "labelled") == uninterrupted


def test_a_rank_killed_while_it_wrote_the_manifest_leaves_nothing(job, uninterrupted, tmp_path):
    shutil.copytree(job.output, tmp_path / "labelled")
    manifest = tmp_path / "labelled" / MANIFEST_NAME
    manifest.unlink()
    manifest.with_name(f".{MANIFEST_NAME}.partial").write_text("{", encoding="utf-8")
    with Lock(manifest) as lock:
        held = lock.path.read_text()
    lock.path.write_text(json.dumps(json.loads(held) | {"started": 1}))  # as of a process that has ended
    run_ranks(2, label, moved(job, tmp_path / "labelled"))
    assert contents(tmp_path / "labelled") == uninterrupted


class _Kill(Exception):
    """Raised to make run_ranks kill its ranks."""


def label_and_stop(job: LabelSection, rank: int, renames: int, after: bool, marks: Path) -> None:
    """Label; ``rank`` pauses forever just before or after its rename number ``renames``."""
    me, rename, count = int(os.environ["RANK"]), os.replace, 0

    def stopping(*paths) -> None:
        nonlocal count
        count += 1
        stop = me == rank and count == renames
        if after or not stop:
            rename(*paths)
        if stop:
            (marks / "stopped").touch()
            signal.pause()

    os.replace = stopping  # affects only this rank, which is a separate process
    label(job)
    (marks / f"done{me}").touch()


def kill_when_stopped(marks: Path, ranks: int) -> None:
    """Raise once a rank has paused; return if all ranks end."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while len(list(marks.glob("done*"))) < ranks:
        if (marks / "stopped").exists():
            raise _Kill
        assert time.monotonic() < deadline, "no rank stopped or ended"
        time.sleep(0.005)


def test_a_job_killed_at_any_rename_ends_with_the_same_bytes(job, uninterrupted, tmp_path):
    job, chance, kills = moved(job, tmp_path / "labelled"), random.Random(0), 0
    for start in range(STARTS):
        marks = tmp_path / str(start)
        marks.mkdir()
        with contextlib.suppress(_Kill):
            moment = (chance.randrange(2), chance.randint(1, 3), chance.random() < 0.5)
            run_ranks(2, label_and_stop, job, *moment, marks, meanwhile=partial(kill_when_stopped, marks, 2))
            assert contents(Path(job.output)) == uninterrupted
            shutil.rmtree(job.output)
            continue
        kills += 1
    run_ranks(2, label, job)
    assert contents(Path(job.output)) == uninterrupted
    assert kills >= FEWEST_KILLS
