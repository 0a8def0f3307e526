"""Logging of the commands: one format, rank 0 only, without the libraries' informational output.

Modules log to ``logging.getLogger(__name__)``. A command calls :func:`configure_logging`; an application that uses this
package as a library configures logging itself, and nothing is silenced. NeMo and its trainer log a few hundred lines
about optional packages, deprecations and Megatron internals: their informational lines and warnings are dropped by
logger name, their errors are shown. ``--verbose`` or ``TREG_VERBOSE=1`` shows everything.
"""

import logging
import os
import sys
import warnings

#: loggers whose informational lines users of this package do not need
CHATTY = (
    *("pytorch_lightning.utilities", "pytorch_lightning.trainer", "lightning_fabric.utilities"),
    *("lightning.pytorch.utilities", "lightning.pytorch.trainer", "lightning.fabric.utilities"),
    *(
        "transformers",
        "datasets",
        "accelerate",
        "torch",
        "torchao",
        "nemo_run",
        "absl",
        "matplotlib",
        "filelock",
        "fsspec",
        "urllib3",
    ),
)
#: loggers that also warn, of packages or devices that are not used here
FALSE_ALARMS = ("nemo", "megatron", "modelopt", "nv_one_logger", "numexpr")
#: NeMo's logger, which sets its own level when it is imported
NEMO = "nemo_logger"
#: warnings that only the developers of a library can act on
WARNS = ("megatron", "nemo", "lightning", "torch", "transformers", "modelopt", "numpy", "pydantic", "hydra", "zarr")

#: a process's rank, as launchers name it: see distributed.launch
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "JSM_NAMESPACE_RANK", "PMI_RANK", "PALS_RANKID", "SLURM_PROCID")


def configure_logging() -> None:
    """Show this package's log lines of rank 0, and silence the libraries; call before importing torch. Idempotent."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    own = logging.getLogger("treg_megatron")
    own.setLevel(logging.INFO)
    own.propagate = False
    if not own.handlers:
        handler = _StandardStreams()
        handler.addFilter(lambda record: _is_error(record) or not rank_of_environment())
        own.addHandler(handler)
    if is_verbose():
        own.setLevel(logging.DEBUG)
        own.handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        return
    own.handlers[0].setFormatter(_Plain())
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in FALSE_ALARMS:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger(NEMO).addFilter(_is_error)
    for package in WARNS:
        warnings.filterwarnings("ignore", module=rf"{package}(\.|$)")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of the processes that Megatron's checkpoint writer starts


def rank_of_environment() -> int:
    """This process's rank, as set by its launcher; 0 without one."""
    return next((int(os.environ[name]) for name in RANK_VARIABLES if os.environ.get(name)), 0)


def is_verbose() -> bool:
    """Whether the user asked to see everything."""
    return os.environ.get("TREG_VERBOSE") == "1"


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


class _StandardStreams(logging.Handler):
    """Warnings and errors to the current sys.stderr, everything else to the current sys.stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        print(self.format(record), file=stream, flush=True)


class _Plain(logging.Formatter):
    """The message alone, preceded by its level if that is above INFO."""

    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno <= logging.INFO else f"{record.levelname.lower()}: {message}"
