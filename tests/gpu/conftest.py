"""Fixtures of the pipeline tests; every test here needs a CUDA device."""

import pytest
import torch

from tests.pipeline.conftest import tiny_hf  # noqa: F401 -- a fixture


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "tests/gpu/" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
