"""Imports with garbage collection paused leave the process as it was."""

import gc
import sys

import pytest

from treg_megatron.utils.imports import heavy_imports


@pytest.fixture
def something_to_import(tmp_path, monkeypatch):
    (tmp_path / "made_for_this_test.py").write_text("kept = [[]]", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("made_for_this_test", None)
    gc.unfreeze()


def test_only_what_was_imported_is_kept_for_good(something_to_import):
    gc.unfreeze()
    with heavy_imports():
        pass
    assert gc.get_freeze_count() == 0
    with heavy_imports():
        assert not gc.isenabled()
        import made_for_this_test  # noqa: F401
    assert gc.isenabled() and gc.get_freeze_count() > 0


def test_collection_resumes_even_after_a_failed_import():
    with pytest.raises(ModuleNotFoundError), heavy_imports():
        import there_is_no_such_module  # noqa: F401
    assert gc.isenabled()
