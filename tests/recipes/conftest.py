"""One warm process, as for tests/parallel."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support.forked import warm_up  # noqa: E402

warm_up()
