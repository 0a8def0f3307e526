"""The package alpaca_eval as it is installed from PyPI, in an environment of its own: `make test-eval`.

All tests of this folder are skipped where TREG_ALPACA_EVAL_PYTHON does not name that environment's Python.
"""

import os
from pathlib import Path

import pytest

PYTHON = os.environ.get("TREG_ALPACA_EVAL_PYTHON")


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if not PYTHON and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="TREG_ALPACA_EVAL_PYTHON names no Python (make test-eval)"))


@pytest.fixture(scope="session")
def alpaca_eval_python() -> str:
    assert PYTHON is not None
    return PYTHON
