"""Files are complete or absent."""

import pytest

from treg_megatron.errors import UserError
from treg_megatron.utils.files import (
    atomic_write,
    atomic_write_all,
    read_manifest,
    sha256_of,
    sha256_of_json,
    write_manifest,
)


def test_a_file_appears_when_its_block_ends(tmp_path):
    target = tmp_path / "new" / "file"
    with atomic_write(target) as partial:
        partial.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_a_block_that_fails_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_write_all([tmp_path / "a", tmp_path / "b"]) as (a, b):
        a.write_text("new")
        b.write_text("new")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_an_old_manifest_never_describes_mixed_files(tmp_path, monkeypatch):
    for name in ("data", "manifest"):
        (tmp_path / name).write_text("old")

    def killed(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with atomic_write_all([tmp_path / "data", tmp_path / "manifest"], tmp_path / "manifest") as partials:
            for partial in partials:
                partial.write_text("new")
            monkeypatch.setattr("os.replace", killed)
    assert not (tmp_path / "manifest").exists()


def test_an_unwritable_path_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write .*file"), atomic_write(tmp_path / "file" / "new") as partial:
        partial.write_text("x")


def test_manifests_know_their_format(tmp_path):
    path = tmp_path / "manifest.json"
    write_manifest(path, "apples", 2, {"count": 3, "name": "\u00e9"})
    assert read_manifest(path, "apples", 2) == {"format": "apples", "version": 2, "count": 3, "name": "\u00e9"}
    for format, version, message in (("pears", 2, "is not a manifest of pears"), ("apples", 1, "has schema version 2")):
        with pytest.raises(UserError, match=message):
            read_manifest(path, format, version)


def test_hashes(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    assert sha256_of(tmp_path / "empty").startswith("e3b0c44298fc1c14")
    assert sha256_of_json({"a": 1, "b": [2]}) == sha256_of_json({"b": [2], "a": 1}) != sha256_of_json({"a": 1})
