"""Fixtures shared by tests of all folders."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct, a trained model; `make test` builds it."""
    if "TREG_REAL_MODEL" not in os.environ:
        pytest.skip("TREG_REAL_MODEL names no folder of SmolLM2-135M-Instruct (python demo/smollm2.py builds one)")
    return Path(os.environ["TREG_REAL_MODEL"])
