"""Logging of the commands: what a user sees, and that a user's own logging is left alone."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import logging, sys, warnings
from treg_megatron.utils.log import configure_logging
if "library" not in sys.argv:
    configure_logging()
    configure_logging()
ours, theirs, other = (logging.getLogger(n) for n in ("treg_megatron.train", "lightning.pytorch", "mine"))
theirs.setLevel(logging.INFO) if "library" in sys.argv else None
if "library" in sys.argv: logging.basicConfig(level=logging.INFO, format="mine: %(message)s")
else: other.addHandler(logging.StreamHandler()); other.setLevel(logging.INFO)
ours.info("step"), ours.warning("careful"), ours.error("broken"), theirs.info("chatter"), other.info("my own line")
warnings.warn("my own warning")
"""


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_PROCID", "TREG_VERBOSE", "PYTHONWARNINGS")}
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=True)


def test_a_command_shows_its_own_lines_once_and_no_chatter():
    done = run()
    assert done.stdout == "step\n"
    assert "warning: careful\nerror: broken\n" in done.stderr and "chatter" not in done.stderr


def test_other_ranks_show_errors_only():
    done = run(RANK="3")
    assert done.stdout == "" and "broken" in done.stderr and "careful" not in done.stderr


def test_other_loggers_and_warnings_of_the_user_still_work():
    done = run()
    assert "my own line" in done.stderr and "my own warning" in done.stderr


def test_a_library_user_configures_logging():
    lines = run("library").stderr.splitlines()
    for expected in ("mine: step", "mine: careful", "mine: chatter", "mine: my own line"):
        assert expected in lines


@pytest.mark.parametrize("rank", ["0", "1"])
def test_verbose_names_time_level_and_module(rank):
    done = run(TREG_VERBOSE="1", RANK=rank)
    assert ("INFO treg_megatron.train: step" in done.stdout) == (rank == "0")
