"""Checkpoints of a run: written whole or not at all, the newest few kept, the newest one found again."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from treg_megatron import __version__
from treg_megatron.checkpoint.layout import CHECKPOINTS, IDENTITY, UNFINISHED_MARKER, Identity, is_complete, write_identity


class SaveEvery(pl.Callback):
    """Saves model, optimizer, schedule and position every so many steps and after the last.

    A checkpoint counts only when every rank has finished it: the marker beside it goes, and treg.json comes, after a
    barrier. Older ones are removed only then.

    Args:
        run: the run's folder.
        steps: optimizer steps between checkpoints.
        keep: how many of the newest stay.
        identity: of the checkpoint that the run started from.
        description: what made the run, for whoever finds the checkpoint; ``metrics`` is read at each save.
    """

    def __init__(self, run: Path, steps: int, keep: int, identity: Identity, description: dict[str, Any],
                 metrics: dict[str, float]):
        self.folder = Path(run) / CHECKPOINTS
        self.steps, self.keep, self.identity = steps, keep, identity
        self.description, self.metrics = description, metrics

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        if trainer.global_step % self.steps == 0 or trainer.global_step == trainer.max_steps:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        checkpoint = self.folder / f"step_{step:06d}"
        marker = checkpoint.with_name(checkpoint.name + UNFINISHED_MARKER)
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            marker.touch()
            shutil.rmtree(checkpoint, ignore_errors=True)
        torch.distributed.barrier()
        trainer.save_checkpoint(str(checkpoint) + ".ckpt")  # NeMo drops the suffix: a folder, one file a rank
        torch.distributed.barrier()
        if trainer.is_global_zero:
            marker.unlink()
            write_identity(checkpoint, dataclasses.replace(
                self.identity, written_by=f"treg-megatron {__version__}, treg_megatron.train",
                run={**self.description, "step": step, "metrics": dict(self.metrics)}))
            remove_old(self.folder, self.keep)
        torch.distributed.barrier()


def remove_unfinished(run: Path) -> list[str]:
    """Delete what an interrupted save left; the names of what went."""
    folder = Path(run) / CHECKPOINTS
    if not folder.is_dir():
        return []
    left = [p for p in folder.glob("step_*") if p.is_dir() and not is_complete(p)]
    for checkpoint in left:
        shutil.rmtree(checkpoint)
    for marker in folder.glob("step_*" + UNFINISHED_MARKER):
        marker.unlink()
    return [p.name for p in left]


def remove_old(folder: Path, keep: int) -> None:
    """Delete all complete checkpoints of ``folder`` but the newest ``keep``."""
    complete = sorted(p for p in folder.glob("step_*") if p.is_dir() and is_complete(p))
    for checkpoint in complete[:-keep]:
        # treg.json first: a removal cut short leaves no checkpoint that looks whole
        (checkpoint / IDENTITY).unlink()
        shutil.rmtree(checkpoint)
