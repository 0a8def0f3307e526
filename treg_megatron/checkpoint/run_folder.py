"""The checkpoints of a run on disk: beginning and completing one, recovery after an interruption, and retention.

Whatever moment of a save is its last, the newest checkpoint that counts is the previous one or the new one, whole.
"""

import dataclasses
import logging
import shutil
from pathlib import Path

from treg_megatron.checkpoint.layout import (
    CHECKPOINTS,
    IDENTITY,
    UNFINISHED_MARKER,
    CheckpointMetadata,
    damage,
    fingerprints,
    is_complete,
    is_finished,
    marker,
    newest_checkpoint,
    write_metadata,
)
from treg_megatron.utils.files import natural_order
from treg_megatron.utils.lock import Lock

logger = logging.getLogger(__name__)

DAMAGED = ".damaged"


def begin(checkpoint: Path, lock: Lock) -> None:
    """Mark a checkpoint as unfinished, and delete what an earlier attempt at it left.

    Raises:
        UserError: another process now writes this run.
    """
    lock.require_held()
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    marker(checkpoint).touch()
    shutil.rmtree(checkpoint, ignore_errors=True)


def complete(checkpoint: Path, identity: CheckpointMetadata, keep: int, lock: Lock) -> None:
    """Certify a checkpoint whose files every rank has written; then remove all but the newest ``keep`` of the run.

    Raises:
        UserError: another process now writes this run.
    """
    lock.require_held()
    write_metadata(checkpoint, dataclasses.replace(identity, files=fingerprints(checkpoint)))
    marker(checkpoint).unlink()
    remove_old(checkpoint.parent, keep)


def checkpoint_to_resume(run: Path) -> Path | None:
    """Clean up after an interrupted run, logging what is removed, and find the checkpoint to resume from (rank 0)."""
    if left := remove_unfinished(run):
        logger.info("removed checkpoints that an interrupted save left unfinished: %s", ", ".join(left))
    newest = newest_checkpoint(run)
    for checkpoint in (Path(run) / CHECKPOINTS).glob("step_*"):
        if is_finished(checkpoint) and damage(checkpoint):
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
    left = [p for p in _checkpoints(folder) if not is_finished(p)]
    for checkpoint in left:
        shutil.rmtree(checkpoint)
    for path in folder.glob("step_*" + UNFINISHED_MARKER):
        path.unlink()
    return [p.name for p in left]


def remove_old(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` complete checkpoints of ``folder``."""
    whole = sorted((p for p in _checkpoints(folder) if is_complete(p)), key=natural_order)
    for checkpoint in whole[:-keep]:
        # remove treg.json first, so that an interrupted removal leaves nothing that looks complete
        (checkpoint / IDENTITY).unlink()
        shutil.rmtree(checkpoint)


def _checkpoints(folder: Path) -> list[Path]:
    return [p for p in folder.glob("step_*") if p.is_dir() and p.suffix != DAMAGED]
