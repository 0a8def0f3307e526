"""Another value for a name of somebody else's module, for a while."""

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def substituted(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """Inside, ``module.name`` is ``value``: for libraries that name the class that they build, and take no other."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
