"""Rows of datasets on the Hugging Face hub; without network, from the cache of ``datasets``.

hub:OWNER/NAME                          split train
hub:OWNER/NAME:SPLIT
hub:OWNER/NAME@REVISION:SPLIT
hub:OWNER/NAME:CONFIG:SPLIT
hub:OWNER/NAME:CONFIG@REVISION:SPLIT
hub:OWNER/NAME/FOLDER                   one folder of the repository; what follows is as above
"""

import re
from collections.abc import Iterator
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
        UserError: the form is wrong, ``datasets`` is missing, or it finds no such dataset, configuration or split.
    """
    asked = parse_hub_name(source)
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source} needs the package `datasets`: pip install 'datasets<5'") from None
    config = () if asked.config is None else (asked.config,)
    folder = {} if asked.folder is None else {"data_dir": asked.folder}
    try:
        return datasets.load_dataset(asked.name, *config, revision=asked.revision, split=asked.split, **folder)
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
