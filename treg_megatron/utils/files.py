"""Atomic writes, file hashes, and manifests that record how files were made."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.utils.lock import Lock

# Errors of the machine that the user can fix; any other OSError is a bug and keeps its traceback.
_REFUSED_BY_THE_MACHINE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
}


def sha256_of(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_blocks(digest: "hashlib._Hash", path: str | Path, offsets: Iterable[int], block_bytes: int) -> None:
    """Update ``digest`` with the blocks of a file that begin at ``offsets``.

    A sample of a large file changes with nearly every edit of it, and costs a few reads instead of minutes.
    """
    with open(path, "rb") as stream:
        for offset in offsets:
            stream.seek(offset)
            digest.update(stream.read(block_bytes))


def bytes_in(folder: str | Path) -> int:
    """Total bytes of all files below a folder; 0 if it does not exist."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def sha256_of_json(value: Any) -> str:
    """Hex digest of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def natural_order(path: Path) -> list[tuple[int, int | str]]:
    """Sort key for natural order: part-2 before part-10."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"([0-9]+)", path.name)]


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the block succeeds, it is renamed to ``path``.

    If the block raises, nothing is left. A killed process leaves at most ``.NAME.partial``, which the next one
    replaces.

    Raises:
        UserError: the folder is not writable or the disk is full.
    """
    with atomic_write_all([Path(path)]) as partials:
        yield partials[0]


@contextlib.contextmanager
def atomic_write_all(
    paths: list[Path], replaced_first: Path | None = None, optional: Collection[Path] = ()
) -> Iterator[list[Path]]:
    """:func:`atomic_write` for files that belong together: they are renamed in order, with nothing in between.

    ``replaced_first`` is the manifest of the others, the last of ``paths``. An old one is removed before the first
    rename, so that a manifest never describes a mixture of old and new files. The block may leave out ``optional``
    ones; an old file of that name is then removed.
    """
    partials = [path.with_name(f".{path.name}.partial") for path in paths]
    try:
        for folder in {path.parent for path in paths}:
            folder.mkdir(parents=True, exist_ok=True)
        for path, partial in zip(paths, partials, strict=True):
            if path in optional:  # left by a killed process, it would count as written
                partial.unlink(missing_ok=True)
        yield partials
        written = {path: p for path, p in zip(paths, partials, strict=True) if path not in optional or p.exists()}
        for partial in written.values():
            _sync(partial)
        if replaced_first is not None:
            replaced_first.unlink(missing_ok=True)
        for path, partial in written.items():
            os.replace(partial, path)
        for path in optional:
            if path not in written:
                path.unlink(missing_ok=True)
        for folder in {path.parent for path in paths}:
            _sync(folder)
    except OSError as error:
        if error.errno not in _REFUSED_BY_THE_MACHINE:
            raise
        raise UserError(f"cannot write {error.filename or paths[0]}: {error.strerror or error}") from None
    finally:
        for partial in partials:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(output: Path, nbytes: int) -> Iterator[Path]:
    """Yields an empty folder beside ``output`` that becomes ``output`` when the block ends, and vanishes if it fails.

    A folder left by a killed process is deleted and written anew.

    Raises:
        UserError: ``output`` exists, another process is writing it, or its disk has no room for ``nbytes``.
    """
    refuse_existing(output)
    unfinished = output.with_name(output.name + ".unfinished")
    with Lock(output) as lock:
        refuse_existing(output)  # another process may just have finished it
        try:
            if unfinished.exists():
                shutil.rmtree(unfinished)
            free = shutil.disk_usage(output.parent).free
            if nbytes > free:
                raise UserError(
                    f"not enough disk space for {output}: it needs {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
                )
            unfinished.mkdir()
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror}") from None
        try:
            yield unfinished
            lock.require_held()
            unfinished.rename(output)
        except BaseException as error:
            if lock.is_held():
                shutil.rmtree(unfinished, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"the disk of {output} is full; nothing was written") from None
            raise


def refuse_existing(output: Path) -> None:
    """Raises :class:`UserError` if ``output`` exists: nothing is ever overwritten."""
    if output.is_symlink() and not output.exists():
        raise UserError(f"{output} is a link to {os.readlink(output)}, which does not exist; remove it, or make that")
    if output.exists():
        raise UserError(f"{output} already exists; delete it or choose another folder")


def write_manifest(path: str | Path, format: str, version: int, content: dict[str, Any]) -> None:
    """Write a manifest atomically: indented JSON that starts with its format and schema version."""
    with atomic_write(path) as partial:
        partial.write_text(manifest_text(format, version, content), encoding="utf-8")


def manifest_text(format: str, version: int, content: dict[str, Any]) -> str:
    """The text of a manifest, to be written and renamed together with other files."""
    return json.dumps({"format": format, "version": version, **content}, indent=2, ensure_ascii=False) + "\n"


def read_manifest(path: str | Path, format: str, version: int) -> dict[str, Any]:
    """Read a manifest of one format and schema version.

    Raises:
        UserError: the file is missing, is not JSON, or is a manifest of something else.
    """
    path = Path(path)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: what it should vouch for is unfinished or was never made") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a manifest: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != format:
        raise UserError(f"{path} is not a manifest of {format}")
    if manifest.get("version") != version:
        raise UserError(
            f"{path} has schema version {manifest.get('version')!r}, this release reads {version}; "
            "make the files again, or use the release that wrote them"
        )
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        UserError: the file does not exist or does not hold a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object")
    return content


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
