"""A checkpoint on disk, and how to tell a whole one from a half-written one.

CHECKPOINT/weights/     megatron-core distributed checkpoint (torch_dist), as NeMo loads and saves it
CHECKPOINT/treg.json    what the weights are, and a fingerprint of every other file; written last
RUN/checkpoints/step_000020/ ...                   the checkpoints of a training run
RUN/checkpoints/step_000020-unfinished             NeMo's marker beside a checkpoint that is being written
"""

import dataclasses
import hashlib
import json
import logging
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treg_megatron.config.recipe import with_current_keys
from treg_megatron.errors import UserError
from treg_megatron.utils.files import atomic_write, hash_blocks, read_json, read_manifest, write_manifest

logger = logging.getLogger(__name__)

WEIGHTS = "weights"
IDENTITY = "treg.json"
CHECKPOINTS = "checkpoints"
UNFINISHED_MARKER = "-unfinished"
SCHEMA = 2
FIRST_SCHEMA = 1  # imports had no list of files then

EXPORT_MANIFEST = "treg_export.json"
EXPORT_FORMAT, EXPORT_VERSION = "treg-megatron/export", 1
EDITABLE = "README.md"  # the model card, which people complete

# NeMo wraps Megatron-core's model once: its keys in a checkpoint have this prefix.
MODEL_PREFIX = "module."

# A fingerprint reads this much of a file, in blocks from end to end: all of a small file, a sample of a large one.
BLOCKS, BLOCK_BYTES = 64, 1 << 16


@dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint holds: the content of treg.json.

    Attributes:
        family: architecture name, as in config.json.
        hf_config: config.json of the model, whole.
        dtype: precision of the Hugging Face weights that the model came from ("float32", "bfloat16", "float16").
        other_dtypes: by key, the precision of parameters where it is not ``dtype``.
        source: the Hugging Face folder that was imported.
        written_by: the program and version that wrote the checkpoint.
        run: of a training checkpoint, what made it (for the model card): step, recipe, data, metrics.
        files: the fingerprint of each file by its path in the checkpoint.
        schema: version of this file's layout.
    """

    family: str
    hf_config: dict[str, Any]
    dtype: str
    source: str
    written_by: str
    run: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    other_dtypes: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA


def write_metadata(checkpoint: Path, identity: CheckpointMetadata) -> None:
    """Write treg.json in one step: it is whole or absent. Call it after everything else is in place."""
    with atomic_write(checkpoint / IDENTITY) as partial:
        partial.write_text(json.dumps(dataclasses.asdict(identity), indent=2) + "\n", encoding="utf-8")


def read_metadata(checkpoint: Path) -> CheckpointMetadata:
    """treg.json of a complete checkpoint.

    Raises:
        UserError: there is none, it is half-written, or another version of this program wrote it.
    """
    if not checkpoint.is_dir():
        raise UserError(f"checkpoint {checkpoint} does not exist")
    if marker(checkpoint).exists():
        raise UserError(
            f"checkpoint {checkpoint} is unfinished ({marker(checkpoint).name} is beside it); use an earlier one"
        )
    path = checkpoint / IDENTITY
    if not path.is_file():
        raise UserError(f"{checkpoint} is not a complete checkpoint: it has no {IDENTITY}")
    content = read_json(path)
    if content.get("schema") not in (FIRST_SCHEMA, SCHEMA):
        raise UserError(f"{path} has schema {content.get('schema')!r}, this version reads {FIRST_SCHEMA} and {SCHEMA}")
    try:
        identity = CheckpointMetadata(**content)
    except TypeError as error:
        raise UserError(f"{path} does not fit its schema: {error}") from None
    if "recipe" in identity.run:
        identity.run["recipe"] = with_current_keys(identity.run["recipe"])
    return identity


def is_finished(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end, whatever became of it since."""
    return (checkpoint / IDENTITY).is_file() and not marker(checkpoint).exists()


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end and its files are there in their sizes.

    Costs no more than listing them; :func:`damage` also looks into them.
    """
    return is_finished(checkpoint) and damage(checkpoint, contents=False) is None


def newest_checkpoint(run: Path) -> Path | None:
    """The complete and undamaged checkpoint of the highest step in RUN/checkpoints, or None.

    Logs a warning for each damaged one that is newer.
    """
    folder = Path(run) / CHECKPOINTS
    if not folder.is_dir():
        return None
    steps = {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := re.fullmatch(r"step_(\d+)", path.name)) and path.is_dir() and is_finished(path)
    }
    for step in sorted(steps, reverse=True):
        wrong = damage(steps[step])
        if wrong is None:
            return steps[step]
        logger.warning("checkpoint %s is damaged (%s): using the one before it", steps[step].name, wrong)
    return None


def fingerprints(folder: Path) -> dict[str, str]:
    """Size and digest of each file below a folder, by its path in it, except those that hold such lists."""
    return {
        path.relative_to(folder).as_posix(): _fingerprint(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (IDENTITY, EXPORT_MANIFEST)
    }


def damage(checkpoint: Path, contents: bool = True) -> str | None:
    """What is wrong with the files of a checkpoint, in a few words; None if they look as written.

    Args:
        contents: look into the files, too, which reads up to 4 MB of each; otherwise at their sizes only.
    """
    try:
        metadata = read_metadata(checkpoint)
        if metadata.schema == FIRST_SCHEMA and not metadata.run:
            from treg_megatron.checkpoint.torch_dist import TorchDistReader  # imports torch

            return TorchDistReader(checkpoint / WEIGHTS).damage()
        if not any(name.startswith(f"{WEIGHTS}/") for name in metadata.files):
            return f"its {IDENTITY} lists no weights"
        return _difference(checkpoint, metadata.files, contents)
    except (OSError, UserError) as error:
        return str(error)


def require_whole(checkpoint: Path) -> CheckpointMetadata:
    """treg.json of a checkpoint that is complete and undamaged.

    Raises:
        UserError: as :func:`read_metadata`, or a file is missing or is not what was written.
    """
    metadata = read_metadata(checkpoint)
    if wrong := damage(checkpoint):
        raise UserError(f"checkpoint {checkpoint} is damaged ({wrong}): use an earlier one, or make it again")
    return metadata


def certify_export(folder: Path) -> None:
    """Write the list of an exported folder's files, as the last of them."""
    write_manifest(folder / EXPORT_MANIFEST, EXPORT_FORMAT, EXPORT_VERSION, {"files": fingerprints(folder)})


def require_whole_export(folder: Path) -> None:
    """Check a Hugging Face folder that this program exported; any other folder has no list to check.

    Raises:
        UserError: a file other than the model card is missing or is not what was exported.
    """
    if not (folder / EXPORT_MANIFEST).exists():
        return
    files = read_manifest(folder / EXPORT_MANIFEST, EXPORT_FORMAT, EXPORT_VERSION).get("files")
    if not isinstance(files, dict) or not any(name.endswith(".safetensors") for name in files):
        raise UserError(f"{folder / EXPORT_MANIFEST} lists no weights: export again")
    if wrong := _difference(folder, {name: files[name] for name in files if name != EDITABLE}):
        raise UserError(
            f"{folder} is not what was exported ({wrong}): export again, or remove {EXPORT_MANIFEST} "
            "if the change is yours"
        )


def _difference(folder: Path, files: dict[str, str], contents: bool = True) -> str | None:
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if not expected.startswith(f"{path.stat().st_size} bytes,"):
            return f"{name} has {path.stat().st_size} bytes, {expected.partition(',')[0]} were written"
        if contents and _fingerprint(path) != expected:
            return f"{name} is not what was written"
    return None


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256()
    offsets = list(range(0, size, BLOCK_BYTES))
    if len(offsets) > BLOCKS:
        offsets = [block * (size - BLOCK_BYTES) // (BLOCKS - 1) for block in range(BLOCKS)]
    hash_blocks(digest, path, offsets, BLOCK_BYTES)
    return f"{size} bytes, sha256 {digest.hexdigest()}"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint or a run with checkpoints, complete or not, and no Hugging Face folder."""
    return (folder / WEIGHTS).is_dir() or (folder / CHECKPOINTS).is_dir()


def find_checkpoint(folder: Path) -> Path:
    """The checkpoint that a user means by ``folder``: itself, or the newest complete one of a run.

    Raises:
        UserError: it is neither, or it is unfinished or damaged.
    """
    folder = Path(folder)
    if (folder / CHECKPOINTS).is_dir():
        newest = newest_checkpoint(folder)
        if newest is None:
            raise UserError(f"run {folder} has no complete checkpoint yet")
        return newest
    require_whole(folder)
    return folder


def marker(checkpoint: Path) -> Path:
    """The file beside a checkpoint that is being written; NeMo's name for it."""
    return checkpoint.with_name(checkpoint.name + UNFINISHED_MARKER)
