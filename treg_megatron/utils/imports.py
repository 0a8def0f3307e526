"""Garbage collection paused during heavy imports: Megatron, NeMo and transformers load 8,500 modules."""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Import with CPython's garbage collector off, and exempt what was imported from later collections.

    The collector rescans the heap whenever it has grown by a quarter: about 20 % of the time that the imports take.
    A forked process does not copy frozen objects by scanning them.
    """
    collecting, modules = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > modules:  # otherwise it would only keep the caller's garbage alive
            gc.freeze()
        if collecting:
            gc.enable()
