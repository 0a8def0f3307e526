"""Checkpoints of a run: atomic saves, retention of the newest few, and recovery of the newest intact one."""

import contextlib
import dataclasses
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from treg_megatron import __version__
from treg_megatron.checkpoint.layout import (
    CHECKPOINTS,
    CheckpointMetadata,
    newest_checkpoint,
)
from treg_megatron.checkpoint.run_folder import begin, complete, remove_unfinished
from treg_megatron.distributed.launch import on_rank_zero
from treg_megatron.errors import UserError
from treg_megatron.utils.files import bytes_in
from treg_megatron.utils.lock import Lock
from treg_megatron.utils.signals import advised_seconds, seconds_before_time_limit

logger = logging.getLogger(__name__)


class SaveEvery(pl.Callback):
    """Saves model, optimizer, schedule and data position every ``steps`` steps, after the last, and before a stop.

    A checkpoint is valid only once every rank has finished it: after a barrier treg.json is written and its marker is
    removed. Older checkpoints are removed only after that.

    Args:
        run: the run's folder.
        steps: optimizer steps between checkpoints.
        keep: number of newest checkpoints to keep.
        identity: metadata of the checkpoint that the run started from.
        description: provenance of the run, stored in each checkpoint.
        metrics: the latest metrics, read at each save.
        lock: of the run's checkpoints, held by rank 0.

    Raises:
        UserError: on every rank, if a rank cannot write its part; that checkpoint is removed completely.
    """

    def __init__(
        self,
        run: Path,
        steps: int,
        keep: int,
        identity: CheckpointMetadata,
        description: dict[str, Any],
        metrics: dict[str, float],
        lock: Lock,
    ):
        self.folder = Path(run) / CHECKPOINTS
        self.steps, self.keep, self.identity = steps, keep, identity
        self.description, self.metrics, self.lock = description, metrics, lock
        self._measured = False

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
        begun = time.monotonic()
        finish = lambda: self._finish(checkpoint, identity, begun)  # noqa: E731
        with self._refused(checkpoint):
            on_rank_zero(lambda: begin(checkpoint, self.lock))
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

    def _finish(self, checkpoint: Path, identity: CheckpointMetadata, begun: float) -> None:
        torch.distributed.barrier()
        on_rank_zero(lambda: complete(checkpoint, identity, self.keep, self.lock))
        if not self._measured:
            self._measured = True
            warn_of_slow_save(time.monotonic() - begun)

    @contextlib.contextmanager
    def _refused(self, checkpoint: Path):
        try:
            yield
        except (CheckpointException, CheckpointingException, OSError, UserError) as error:
            good = newest_checkpoint(self.folder.parent)
            full = "No space left" in str(error) or _disk_is_full(self.folder, good)
            if torch.distributed.get_rank() == 0 and self.lock.is_held():  # also frees its space
                remove_unfinished(self.folder.parent)
            reason = "No space left on device" if full else str(error).splitlines()[0]
            raise UserError(
                f"{checkpoint} could not be written: {reason}; "
                + (f"{good.name} is complete" if good else "there is no earlier one")
                + ": free disk space and run the same command again"
            ) from error


def warn_of_slow_save(seconds: float) -> None:
    """Warn if a save that takes so long may not end between Slurm's signal and the time limit."""
    before = seconds_before_time_limit()
    if before is not None and seconds > before / 2:
        logger.warning(
            "a save takes %.0f s, Slurm's signal comes %d s before the time limit: submit with SBATCH_SIGNAL=USR1@%d",
            seconds,
            before,
            advised_seconds(seconds),
        )


def _disk_is_full(folder: Path, written: Path | None) -> bool:
    """Whether a checkpoint as large as the last one does not fit; torch's message does not say why a write failed."""
    needed = bytes_in(written) if written else 1 << 20
    return shutil.disk_usage(folder).free < needed
