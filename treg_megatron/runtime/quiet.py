"""NeMo's chatter, down to what a user of this program needs.

Importing NeMo and starting its trainer logs a few hundred lines about optional packages, deprecations and the inside
of Megatron. Warnings while running and all errors still come through; ``TREG_VERBOSE=1`` lets everything through.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

HARMLESS = (
    # "Rank 1 common state dict differs": the order of the optimizer's parameter groups, which loading matches by content
    "megatron.core.dist_checkpointing.validation",
    # a deprecation inside NeMo's own call
    "megatron.core.dist_checkpointing.serialization",
)


def quieten() -> None:
    """Drop informational logging and Python's warnings from here on; call before importing torch."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not _verbose():
        warnings.filterwarnings("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of the processes that Megatron's checkpoint writer starts
        logging.disable(logging.INFO)
        for name in HARMLESS:
            logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def unheard_imports() -> Iterator[None]:
    """Drop logged warnings as well: while importing they are about packages that this program does not use."""
    if _verbose():
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _verbose() -> bool:
    return os.environ.get("TREG_VERBOSE") == "1"
