"""One process with the real Python modules of Transformer Engine, `make test-te`; ranks are forked from it.

All tests of this folder are skipped where TREG_ENGINE does not name the folder into which its wheel is installed.
"""

import os
from pathlib import Path

import pytest

FOLDER = os.environ.get("TREG_ENGINE")

if FOLDER:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from tests.support.engine import use_engine
    from tests.support.forked import warm_up

    use_engine(Path(FOLDER))
    warm_up()


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if not FOLDER and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="TREG_ENGINE names no folder of Transformer Engine (make test-te)"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """A random model of each architecture: the imported checkpoint, with the Hugging Face folder ``hf`` beside it."""
    from tests.support.tiny_families import SPECIAL, tiny_family
    from treg_megatron.checkpoint.from_hf import import_checkpoint

    folders = {family: tmp_path_factory.mktemp(family) for family in SPECIAL}
    for family, folder in folders.items():
        import_checkpoint(tiny_family(folder / "hf", family, tied=False), folder / "megatron")
    return {family: folder / "megatron" for family, folder in folders.items()}
