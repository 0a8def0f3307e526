"""Checkpoints of a run: atomic saves, retention of the newest few, and recovery of the newest intact one."""

import contextlib
import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from treg_megatron import __version__
from treg_megatron.checkpoint.layout import (
    CHECKPOINTS,
    IDENTITY,
    UNFINISHED_MARKER,
    CheckpointMetadata,
    damage,
    fingerprints,
    is_complete,
    newest_checkpoint,
    write_metadata,
)
from treg_megatron.distributed.launch import on_rank_zero
from treg_megatron.errors import UserError
from treg_megatron.utils.files import bytes_in

logger = logging.getLogger(__name__)

DAMAGED = ".damaged"


class SaveEvery(pl.Callback):
    """Saves model, optimizer, schedule and position every ``steps`` steps, after the last, and before a stop.

    A checkpoint counts only once every rank has finished it: after a barrier its marker is removed and treg.json is
    written. Only then are older ones removed.

    Args:
        run: the run's folder.
        steps: optimizer steps between checkpoints.
        keep: number of newest checkpoints to keep.
        identity: that of the checkpoint the run started from.
        description: provenance of the run, stored in each checkpoint.
        metrics: the latest metrics, read at each save.

    Raises:
        UserError: on every rank, if a rank cannot write its part; nothing of that checkpoint is left.
    """

    def __init__(
        self,
        run: Path,
        steps: int,
        keep: int,
        identity: CheckpointMetadata,
        description: dict[str, Any],
        metrics: dict[str, float],
    ):
        self.folder = Path(run) / CHECKPOINTS
        self.steps, self.keep, self.identity = steps, keep, identity
        self.description, self.metrics = description, metrics

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        last = trainer.should_stop or trainer.global_step == trainer.max_steps
        due = last or trainer.global_step % self.steps == 0
        self._finish_pending(trainer, wait=due)
        if due:
            self._save(trainer)
        if last:
            self._finish_pending(trainer, wait=True)

    def _save(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        checkpoint = self.folder / f"step_{step:06d}"
        identity = dataclasses.replace(
            self.identity,
            written_by=f"treg-megatron {__version__}, treg_megatron.train",
            run={**self.description, "step": step, "metrics": dict(self.metrics)},
        )
        background = trainer.strategy.async_save
        finish = lambda: self._finish(checkpoint, identity)  # noqa: E731
        with self._refused(checkpoint):
            on_rank_zero(lambda: _begin(checkpoint))
            # NeMo drops the suffix and writes a folder with one file per rank
            trainer.save_checkpoint(
                f"{checkpoint}.ckpt", storage_options={"finalize_fn": finish} if background else None
            )
            if not background:
                finish()

    def _finish_pending(self, trainer: pl.Trainer, wait: bool) -> None:
        """Complete the checkpoint being written in the background, if there is one and all ranks have finished it."""
        if trainer.strategy.async_save:
            with self._refused(self.folder):
                trainer.strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=wait)

    def _finish(self, checkpoint: Path, identity: CheckpointMetadata) -> None:
        torch.distributed.barrier()
        on_rank_zero(lambda: _complete(checkpoint, identity, self.keep))

    @contextlib.contextmanager
    def _refused(self, checkpoint: Path):
        try:
            yield
        except (CheckpointException, CheckpointingException, OSError, UserError) as error:
            good = newest_checkpoint(self.folder.parent)
            full = "No space left" in str(error) or _lacks_room(self.folder, good)
            if torch.distributed.get_rank() == 0:  # also frees its space
                remove_unfinished(self.folder.parent)
            reason = "No space left on device" if full else str(error).splitlines()[0]
            raise UserError(
                f"{checkpoint} could not be written: {reason}; "
                + (f"{good.name} is whole" if good else "there is no earlier one")
                + ": make room and start the same command again"
            ) from error


def _lacks_room(folder: Path, written: Path | None) -> bool:
    """Whether a checkpoint the size of the last one does not fit; torch's message does not tell why a write failed."""
    needed = bytes_in(written) if written else 1 << 20
    return shutil.disk_usage(folder).free < needed


def _begin(checkpoint: Path) -> None:
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    _marker(checkpoint).touch()
    shutil.rmtree(checkpoint, ignore_errors=True)


def _complete(checkpoint: Path, identity: CheckpointMetadata, keep: int) -> None:
    write_metadata(checkpoint, dataclasses.replace(identity, files=fingerprints(checkpoint)))
    _marker(checkpoint).unlink()
    remove_old(checkpoint.parent, keep)


def checkpoint_to_resume(run: Path) -> Path | None:
    """Clean up after an interrupted run, logging what is removed, and find the checkpoint to resume from (rank 0)."""
    if left := remove_unfinished(run):
        logger.info("removed checkpoints that an interrupted save left unfinished: %s", ", ".join(left))
    newest = newest_checkpoint(run)
    for checkpoint in (Path(run) / CHECKPOINTS).glob("step_*"):
        if is_complete(checkpoint) and damage(checkpoint):
            # rename it, so that it does not count towards those to keep but can still be inspected
            aside = checkpoint.with_name(checkpoint.name + DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
    return newest


def remove_unfinished(run: Path) -> list[str]:
    """Delete what an interrupted save left; return the names of the checkpoints removed."""
    folder = Path(run) / CHECKPOINTS
    if not folder.is_dir():
        return []
    left = [p for p in _checkpoints(folder) if not is_complete(p)]
    for checkpoint in left:
        shutil.rmtree(checkpoint)
    for marker in folder.glob("step_*" + UNFINISHED_MARKER):
        marker.unlink()
    return [p.name for p in left]


def remove_old(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` complete checkpoints of ``folder``."""
    complete = sorted(p for p in _checkpoints(folder) if is_complete(p))
    for checkpoint in complete[:-keep]:
        # remove treg.json first, so that an interrupted removal leaves nothing that looks complete
        (checkpoint / IDENTITY).unlink()
        shutil.rmtree(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    return [p for p in folder.glob("step_*") if p.is_dir() and p.suffix != DAMAGED]


def _marker(checkpoint: Path) -> Path:
    return checkpoint.with_name(checkpoint.name + UNFINISHED_MARKER)
