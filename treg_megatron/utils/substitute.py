"""Temporary replacement of an attribute of another library's module or object."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def substituted(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set ``owner.name`` to ``value`` inside the block, for libraries that hard-code the class they build."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
