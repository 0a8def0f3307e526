"""NeMo's chatter, down to what a user of this program needs.

Importing NeMo and starting its trainer prints several hundred lines about optional packages, deprecations and the
inside of Megatron. Warnings and errors still come through; set ``TREG_VERBOSE=1`` to hear everything.
"""

import logging
import os
import warnings


def quieten() -> None:
    """Call before the first import of torch, Megatron or NeMo."""
    if os.environ.get("TREG_VERBOSE") == "1":
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("ONE_LOGGER_JOB_CATEGORY", "test")
    warnings.filterwarnings("ignore")
    for name in ("nemo_logger", "nv_one_logger", "megatron", "megatron.core", "lightning.pytorch", "lightning.fabric",
                 "lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero",
                 "torch.distributed", "torchao", "numexpr", "datasets", "transformers", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)
