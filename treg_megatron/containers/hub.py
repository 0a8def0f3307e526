"""Rows of datasets on the Hugging Face hub; without network, from the cache of ``datasets``.

hub:OWNER/NAME                          split train
hub:OWNER/NAME:SPLIT
hub:OWNER/NAME@REVISION:SPLIT
hub:OWNER/NAME:CONFIG:SPLIT
hub:OWNER/NAME:CONFIG@REVISION:SPLIT
hub:OWNER/NAME/FOLDER                   one folder of the repository; what follows is as above

Without network, ``datasets`` takes the latest commit in its cache, whatever the revision. Here a revision is taken at
its word, or refused.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from treg_megatron.containers.arrow_values import plain
from treg_megatron.errors import UserError

_FORM = re.compile(
    r"hub:(?P<name>[\w.-]+/[\w.-]+)"
    r"(/(?P<folder>[\w.-]+(/[\w.-]+)*))?"
    r"(:(?P<config>[^:@]+)(?=[:@]))?"
    r"(@(?P<revision>[^:]+))?"
    r"(:(?P<split>[\w.-]+))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CACHED = "datasets.packaged_modules.cache.cache"  # the module of datasets that are read from its cache
_CONFIGS = re.compile(r"available configs: (\[.*?\])|configurations in the cache: ([^\n]*)", re.DOTALL)


class HubName(NamedTuple):
    """The parts of a ``hub:`` source."""

    name: str
    config: str | None
    revision: str | None
    split: str
    folder: str | None = None


def parse_hub_name(source: str) -> HubName:
    """The parts of ``source``.

    Raises:
        UserError: it has another form.
    """
    match = _FORM.fullmatch(source)
    if match is None:
        raise UserError(
            f"{source} is not of the form hub:OWNER/NAME or hub:OWNER/NAME@REVISION:SPLIT or "
            "hub:OWNER/NAME:CONFIG@REVISION:SPLIT"
        )
    return HubName(match["name"], match["config"], match["revision"], match["split"] or "train", match["folder"])


def load_from_hub(source: str) -> Any:
    """The dataset that ``source`` names.

    Raises:
        UserError: the form is wrong, ``datasets`` is missing, or it finds no such dataset, configuration, revision or
            split.
    """
    asked = parse_hub_name(source)
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source} needs the package `datasets`: pip install 'datasets<5'") from None
    config = () if asked.config is None else (asked.config,)
    folder = {} if asked.folder is None else {"data_dir": asked.folder}
    try:
        builder = datasets.load_dataset_builder(asked.name, *config, revision=asked.revision, **folder)
        if type(builder).__module__ == _CACHED and asked.revision:
            builder = _at_revision(builder, asked, source)
        builder.download_and_prepare()
        return builder.as_dataset(split=asked.split)
    except UserError:
        raise
    except ConnectionError as error:
        raise UserError(
            f"{source} is not in the cache of `datasets`, and the hub cannot be reached: load it once where it can, by "
            f"datasets.load_dataset('{asked.name}'), and copy that cache here (HF_HOME says where it is), or give "
            f"files instead ({' '.join(str(error).split())[:100]})"
        ) from None
    except Exception as error:
        names = _CONFIGS.search(str(error))
        if names and asked.config is None:
            listed = re.findall(r"[^\s,'\"\[\]]+", names[1] or names[2])
            raise UserError(
                f"{source} has several configurations ({', '.join(listed)}): name one, as in "
                f"hub:{asked.name}:{listed[0]}:{asked.split}"
            ) from None
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{source}, split {asked.split}, cannot be loaded: {type(error).__name__}: {reason}") from None


def _at_revision(latest: Any, asked: HubName, source: str) -> Any:
    """What the cache holds of a dataset at a revision, beside the ``latest`` that it holds.

    Raises:
        UserError: it does not hold that revision, or does not know its commit.
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    folder, revision = Path(latest.cache_dir), str(asked.revision)
    reference = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=asked.name, repo_type="dataset") / "refs" / revision
    commit = revision
    if not _COMMIT.fullmatch(revision) and reference.is_file():
        commit = reference.read_text().strip()
    if commit == folder.name:
        return latest
    if _COMMIT.fullmatch(commit) and (folder.parent / commit).is_dir():
        version, config = folder.parent.name, folder.parent.parent.name
        return type(latest)(
            cache_dir=str(folder.parents[3]),
            dataset_name=latest.dataset_name,
            repo_id=asked.name,
            config_name=config,
            version=version,
            hash=commit,
        )
    held = ", ".join(sorted(path.name for path in folder.parent.iterdir() if _COMMIT.fullmatch(path.name)))
    raise UserError(
        f"{source}: the hub cannot be reached, and the cache of `datasets` does not hold revision {revision}, but the "
        f"commits {held}: name one of these, or load the revision where there is a network"
    )


def hub_rows(source: str, before: int = 0) -> Iterator[tuple[int, Any]]:
    """Numbered rows of a hub dataset, counted on from ``before``.

    Raises:
        UserError: as :func:`load_from_hub`, or a column holds what JSON could not.
    """
    for number, row in enumerate(load_from_hub(source), start=before + 1):
        try:
            yield number, {name: plain(value, name) for name, value in row.items()}
        except UserError as error:
            raise UserError(f"{source} row {number}: {error}") from None
