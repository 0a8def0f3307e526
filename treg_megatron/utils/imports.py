"""Imports of Megatron, NeMo and transformers (8,500 modules) with garbage collection paused."""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Disable CPython's garbage collector inside the block, and exempt what it imports from later collections.

    The collector rescans the heap whenever it has grown by a quarter, about 20 % of import time. Frozen objects are
    also not scanned, and so not copied, in forked processes.
    """
    collecting, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:  # otherwise freezing would only keep the caller's garbage alive
            gc.freeze()
        if collecting:
            gc.enable()
