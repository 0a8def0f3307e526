"""Hub datasets: names, configurations as a folder declares them, and the cache of ``datasets`` without a network."""

import json
import os
import subprocess
import sys

import pytest

from treg_megatron.containers.hub import HubName, parse_hub_name
from treg_megatron.data.records import read_rows, source_identity
from treg_megatron.errors import UserError


@pytest.mark.parametrize(
    "source, expected",
    [
        ("hub:o/n", ("o/n", None, None, "train")),
        ("hub:o/n:test", ("o/n", None, None, "test")),
        ("hub:o/n@v1.0", ("o/n", None, "v1.0", "train")),
        ("hub:o/n@v1.0:test", ("o/n", None, "v1.0", "test")),
        ("hub:o/n@refs/pr/1:test", ("o/n", None, "refs/pr/1", "test")),
        ("hub:o/n/a-b/c", ("o/n", None, None, "train", "a-b/c")),
        ("hub:o/n/a@v1.0:test", ("o/n", None, "v1.0", "test", "a")),
        ("hub:o/n:conf:test", ("o/n", "conf", None, "test")),
        ("hub:o/n:conf@v1.0", ("o/n", "conf", "v1.0", "train")),
        ("hub:o-x/n.y_z:en.v1-2 b@v1.0:test", ("o-x/n.y_z", "en.v1-2 b", "v1.0", "test")),
    ],
)
def test_names(source, expected):
    assert parse_hub_name(source) == HubName(*expected)


@pytest.mark.parametrize(
    "source", ["hub:", "hub:n", "hub:o/n/", "hub:o/n//m", "hub:o/n:", "hub:o/n:a:b:c", "hub:o/n@", "hub:o/n::b"]
)
def test_other_forms_are_refused(source):
    with pytest.raises(UserError, match="is not of the form hub:OWNER/NAME or hub:OWNER/NAME@REVISION:SPLIT"):
        list(read_rows(source))


@pytest.fixture()
def two_configurations(tmp_path, monkeypatch):
    """A folder called like a hub dataset, which `datasets` then reads instead of asking the hub."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    configs = {"en.v1": ("train", "test"), "de": ("train",)}
    declared = ["---", "configs:"]
    for config, splits in configs.items():
        declared += [f"- config_name: {config}", "  data_files:"]
        for split in splits:
            declared += [f"  - split: {split}", f"    path: {config}-{split}.jsonl"]
            row = {"prompt": f"{config} {split}", "chosen": {"role": ["assistant"], "content": ["a"]}, "at": None}
            (folder / f"{config}-{split}.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "README.md").write_text("\n".join([*declared, "---", ""]))
    return folder


def test_configurations_are_read_by_name(two_configurations):
    for source, prompt in (
        ("hub:owner/name:en.v1:test", "en.v1 test"),
        ("hub:owner/name:en.v1:train", "en.v1 train"),
        ("hub:owner/name:de:train", "de train"),
    ):
        ((number, row),) = read_rows(source)
        assert (number, row["prompt"], row["chosen"]) == (1, prompt, [{"role": "assistant", "content": "a"}])
        assert source_identity(source)["file"] == source
    assert [number for number, _ in read_rows("hub:owner/name:de:train,hub:owner/name:en.v1:test")] == [1, 2]


def test_one_folder_of_a_repository_is_read(two_configurations):
    (two_configurations / "README.md").unlink()
    for name in ("harmless", "helpful"):
        (two_configurations / name).mkdir()
        (two_configurations / name / "train.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    assert [row["prompt"] for _, row in read_rows("hub:owner/name/harmless")] == ["harmless"]
    assert [row["prompt"] for _, row in read_rows("hub:owner/name/helpful:train")] == ["helpful"]


def test_configurations_are_listed_where_none_is_named(two_configurations):
    with pytest.raises(UserError) as error:
        list(read_rows("hub:owner/name"))
    said = str(error.value)
    assert said.startswith("hub:owner/name has several configurations (") and "\n" not in said
    assert "en.v1" in said and "de" in said and "name one, as in hub:owner/name:" in said


def test_an_unknown_configuration_or_split_names_those_that_exist(two_configurations):
    with pytest.raises(UserError, match="cannot be loaded: ValueError: .*'?fr'? not found.*en.v1"):
        list(read_rows("hub:owner/name:fr:train"))
    with pytest.raises(UserError, match="split dev, cannot be loaded: ValueError: Unknown split.*train"):
        list(read_rows("hub:owner/name:en.v1:dev"))


def test_pictures_are_refused_by_column(tmp_path, monkeypatch):
    import datasets

    dataset = datasets.Dataset.from_dict({"prompt": ["Q"], "x": [b"\x89PNG"]})
    monkeypatch.setattr("treg_megatron.containers.hub.load_from_hub", lambda source: dataset)
    with pytest.raises(UserError, match="hub:o/n row 1: column 'x' holds bytes that are not text"):
        list(read_rows("hub:o/n"))


# -- without a network -------------------------------------------------------------------------------------------------

OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture()
def cached(tmp_path, monkeypatch):
    """A cache that ``datasets`` itself writes, as it does for two commits of owner/name, of which v1 is the older."""
    import datasets
    import huggingface_hub.constants
    from datasets.data_files import DataFilesDict
    from datasets.load import configure_builder_class
    from datasets.packaged_modules.json.json import Json, JsonConfig

    for commit, config in ((OLD, "en"), (NEW, "en"), (NEW, "de")):
        path = tmp_path / f"{config}-{commit[0]}.jsonl"
        path.write_text(json.dumps({"prompt": f"{config} {commit[0]}", "chosen": "x", "rejected": "y"}) + "\n")
        files = DataFilesDict.from_patterns({"train": [str(path)]})
        builder = configure_builder_class(Json, [JsonConfig(name=config, data_files=files)], None, "name")
        place = {"cache_dir": str(tmp_path / "cache"), "dataset_name": "name", "repo_id": "owner/name"}
        builder(**place, config_name=config, hash=commit).download_and_prepare()
    references = tmp_path / "hub" / "datasets--owner--name" / "refs"
    references.mkdir(parents=True)
    (references / "v1").write_text(OLD)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "source, prompt",
    [
        ("hub:owner/name:de:train", "de b"),
        ("hub:owner/name:en:train", "en b"),
        (f"hub:owner/name:en@{OLD}:train", "en a"),
        (f"hub:owner/name:en@{NEW}:train", "en b"),
        ("hub:owner/name:en@v1:train", "en a"),
    ],
)
def test_the_cache_gives_the_revision_that_is_asked_for(cached, source, prompt):
    assert [row["prompt"] for _, row in read_rows(source)] == [prompt]
    assert source_identity(source) == source_identity(source)
    assert source_identity(f"hub:owner/name:en@{OLD}")["sha256"] != source_identity("hub:owner/name:en:train")["sha256"]


@pytest.mark.parametrize(
    "source, expected",
    [
        ("hub:owner/name:en@v2", f"does not hold revision v2, but the commits {OLD}, {NEW}: name one of these"),
        ("hub:owner/name:de@v1", f"does not hold revision v1, but the commits {NEW}: name one"),
        ("hub:owner/name", "has several configurations (de, en): name one"),
        ("hub:owner/other", "is not in the cache of `datasets`, and the hub cannot be reached: load it once where"),
    ],
)
def test_what_the_cache_does_not_hold_is_refused(cached, source, expected):
    with pytest.raises(UserError) as error:
        list(read_rows(source))
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_the_command_reads_the_cache_offline(cached):
    places = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(cached / "cache"), "HF_HUB_CACHE": str(cached / "hub")}
    command = [sys.executable, "-m", "treg_megatron", "inspect", "hub:owner/name:en@v1"]
    done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True, check=True)
    assert "1 pairs, read as trl" in done.stdout and "en a" in done.stdout
