"""A tiny training run on forked ranks: its inputs, its metrics, and ways to kill it."""

import contextlib
import json
import signal
import time
from pathlib import Path
from typing import NamedTuple

import torch

from tests.support.forked import TIMEOUT_SECONDS, run_ranks
from tests.support.tiny import tiny_llama, tiny_pair, tiny_tokenizer

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny.yaml"


class TinyRun(NamedTuple):
    """All inputs of training, created by the pipeline's steps from a random model and synthetic pairs."""

    recipe: Path
    hf: Path
    overrides: list[str]

    def sections(self, output: Path, *overrides: str) -> list[str]:
        return [*self.overrides, f"train.output={output}", *overrides]


def write_pairs(path: Path, count: int) -> None:
    """Write pairs of different lengths, the same at every call."""
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


STEPS = 20


def train_on_this_rank(recipe: Path, overrides: list[str]) -> None:
    from treg_megatron.config.recipe import load_recipe
    from treg_megatron.train import train

    train(load_recipe(recipe, overrides))


def records(output: Path, validation: bool = False) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if ("loss" not in line) == validation]


def run(files: TinyRun, output: Path, size: int, *overrides: str) -> Path:
    run_ranks(
        size,
        train_on_this_rank,
        files.recipe,
        files.sections(output, "data.epochs=4", f"train.max_steps={STEPS}", *overrides),
        log=output.with_suffix(".log"),
    )
    return output


def assert_same(found: list[float], expected: list[float], rtol: float) -> None:
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=0
    )


class Killed(Exception):
    """All ranks were sent SIGKILL."""


def train_and_stop(recipe: Path, overrides: list[str], step: int, saving: bool, stopped: Path) -> None:
    """Train; rank 0 pauses forever after it has written the metrics of ``step``.

    With ``saving``, it pauses when that step's checkpoint has all files except treg.json, which makes it valid.
    """
    from treg_megatron.checkpoint import run_folder
    from treg_megatron.training.callbacks import metrics

    def stop() -> None:
        stopped.touch()
        signal.pause()

    end_of_batch, write_metadata = metrics.RunMetrics.on_train_batch_end, run_folder.write_metadata

    def stop_at_the_end(self, trainer, *rest) -> None:
        end_of_batch(self, trainer, *rest)
        if trainer.is_global_zero and trainer.global_step == step and not saving:
            stop()

    def stop_while_saving(checkpoint: Path, *rest) -> None:
        if saving and checkpoint.name == f"step_{step:06d}":
            stop()
        write_metadata(checkpoint, *rest)

    # affects only this rank, which is a separate process
    metrics.RunMetrics.on_train_batch_end, run_folder.write_metadata = stop_at_the_end, stop_while_saving
    train_on_this_rank(recipe, overrides)


def run_and_kill(files: TinyRun, output: Path, size: int, step: int, *overrides: str, saving: bool = False) -> None:
    """Like :func:`run`, but send SIGKILL to all ranks once rank 0 has paused, see :func:`train_and_stop`."""
    stopped = output.with_suffix(".stopped")

    def kill() -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not stopped.exists():
            assert time.monotonic() < deadline, f"{output} never reached step {step}"
            time.sleep(0.02)
        raise Killed

    with contextlib.suppress(Killed):
        overrides = files.sections(output, "data.epochs=4", f"train.max_steps={STEPS}", *overrides)
        log = output.with_suffix(".log")
        run_ranks(size, train_and_stop, files.recipe, overrides, step, saving, stopped, log=log, meanwhile=kill)
    assert records(output)[-1]["step"] == step
