"""Importing Megatron, NeMo and transformers, 8,500 modules."""

import contextlib
import gc
import logging
import sys
from collections.abc import Iterator

from treg_megatron.utils.quiet import is_verbose


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """Import without what slows it down and without logged warnings, which are about packages that nobody uses here.

    Python looks for garbage each time its heap has grown by a quarter, in all of it: a fifth of the time that the
    imports take. What was imported is never looked through again, and a forked process does not copy it by looking.
    """
    collecting, heard, modules = gc.isenabled(), logging.root.manager.disable, len(sys.modules)
    gc.disable()
    if not is_verbose():
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(heard)
        if len(sys.modules) > modules:  # else it would only keep the caller's garbage
            gc.freeze()
        if collecting:
            gc.enable()
