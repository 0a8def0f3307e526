"""Judgments that benchmarks publish, read from a clone of their repository. None of them is shipped here.

AlpacaEval's data is under CC BY-NC 4.0, its code under Apache 2.0; Arena-Hard's repository is under Apache 2.0.
"""

import os
import subprocess
from pathlib import Path

import pytest

ALPACA_EVAL = "TREG_ALPACA_EVAL_REPOSITORY"  # https://github.com/tatsu-lab/alpaca_eval
ARENA_HARD = "TREG_ARENA_HARD_REPOSITORY"  # https://github.com/lmarena/arena-hard-auto


def stored(variable: str, path: str) -> bytes | None:
    """The content of a file in a repository's newest commit, or None if it is not there.

    Args:
        variable: environment variable that names a clone; a bare one will do. The test is skipped if it is not set.
    """
    repository = os.environ.get(variable)
    if not repository:
        pytest.skip(f"{variable} names no clone of the repository that holds the published judgments")
    done = subprocess.run(["git", "-C", repository, "show", f"HEAD:{path}"], capture_output=True)
    return None if done.returncode else done.stdout


def listed(variable: str, folder: str) -> list[str]:
    """Names in a folder of the newest commit."""
    repository = os.environ.get(variable)
    if not repository:
        pytest.skip(f"{variable} names no clone of the repository that holds the published judgments")
    done = subprocess.run(
        ["git", "-C", repository, "ls-tree", "--name-only", f"HEAD:{folder}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def write(content: bytes, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
