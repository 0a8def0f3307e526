"""One warm process for all parallel tests: it imports NeMo once, and ranks are forked from it."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

from tests.support.forked import warm_up  # noqa: E402
from tests.support.training import TinyRun, make_run  # noqa: E402

warm_up()


@pytest.fixture(scope="session")
def tied_run(tmp_path_factory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="session")
def untied_run(tmp_path_factory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("untied"), tied=False)
