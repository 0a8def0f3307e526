"""Links from a report to what an arm is made of."""

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

_LINKED = ("recipe", "checkpoint", "answers", "judgments")


def arm_links(arm: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """What an arm's record names, each with its address relative to the report's folder."""
    return [(name, _address(arm[name], folder)) for name in _LINKED if arm.get(name)]


def _address(path: str, folder: Path) -> str:
    relative = os.path.relpath(Path(path).expanduser().resolve(), folder.resolve())
    return quote(relative.replace(os.sep, "/"), errors="surrogateescape")
