"""NeMo's chatter, down to what a user of this program needs.

Importing NeMo and starting its trainer logs a few hundred lines about optional packages, deprecations and the inside
of Megatron. Warnings while running and all errors still come through; ``TREG_VERBOSE=1`` lets everything through.
"""

import logging
import os
import warnings

HARMLESS = (
    # "Rank 1 common state dict differs": the order of the optimizer's parameter groups, which loading matches by content
    "megatron.core.dist_checkpointing.validation",
    # a deprecation inside NeMo's own call
    "megatron.core.dist_checkpointing.serialization",
)


def quieten() -> None:
    """Drop informational logging and Python's warnings from here on; call before importing torch."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not is_verbose():
        warnings.filterwarnings("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of the processes that Megatron's checkpoint writer starts
        logging.disable(logging.INFO)
        for name in HARMLESS:
            logging.getLogger(name).setLevel(logging.ERROR)


def is_verbose() -> bool:
    """Whether the user asked to hear everything."""
    return os.environ.get("TREG_VERBOSE") == "1"
