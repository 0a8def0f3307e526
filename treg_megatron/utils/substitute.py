"""Temporary replacement of an attribute of another library's module."""

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def substituted(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Set ``module.name`` to ``value`` inside the block, for libraries that hard-code the class they build."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
