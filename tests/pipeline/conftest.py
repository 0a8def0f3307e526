"""The pipeline's commands as a user runs them: each in its own process, on a model that the tests create."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAIRS = [
    {
        "pair_id": f"p{i}",
        "prompt": f"{i}: say " + "paris " * (1 + i % 5),
        "chosen": "paris " * (1 + i % 3) + "is",
        "rejected": "rome no " * (1 + i % 4),
    }
    for i in range(12)
]


def run_command(
    *arguments: str | Path, ranks: int = 0, cwd: Path = ROOT, timeout: int = 280
) -> subprocess.CompletedProcess:
    """Run ``tools/X.py ARGUMENTS``, or ``-m MODULE ARGUMENTS``; under torchrun if ``ranks`` is given."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


def assert_refused(result: subprocess.CompletedProcess, pattern: str) -> None:
    """Assert exit code 2 and a single error line on stderr that matches the pattern."""
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(pattern, errors[0]), result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory) -> Path:
    """A tiny Llama with 4 attention and 2 key-value heads, so that tensor sizes 1 and 2 fit."""
    folder = tmp_path_factory.mktemp("hf")
    tiny_llama(folder, layers=4, vocab=tiny_tokenizer(folder))
    return folder


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    """Headless Chromium without a network, one for all tests of a page."""
    from tests.support.browser import CHROMIUM, DRIVER, browser

    if not (CHROMIUM and DRIVER):
        if os.environ.get("CI") == "true":
            pytest.fail("Chromium or its driver is not installed; .ci/run installs them")
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened
