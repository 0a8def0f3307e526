"""What a source names: folders of shards, patterns, lists, and splits that must not be mixed."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from treg_megatron.containers.splits import missing_shards, patterns_by_split
from treg_megatron.data.records import read_rows, source_identity
from treg_megatron.errors import UserError


def lines(*numbers):
    return "".join(json.dumps({"n": n}) + "\n" for n in numbers).encode()


def arrow_stream(path, numbers):
    table = pa.table({"n": numbers})
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)


SHARDS = {
    ".jsonl": lambda path, numbers: path.write_bytes(lines(*numbers)),
    ".json": lambda path, numbers: path.write_text(json.dumps([{"n": n} for n in numbers])),
    ".jsonl.gz": lambda path, numbers: path.write_bytes(gzip.compress(lines(*numbers))),
    ".jsonl.bz2": lambda path, numbers: path.write_bytes(bz2.compress(lines(*numbers))),
    ".jsonl.xz": lambda path, numbers: path.write_bytes(lzma.compress(lines(*numbers))),
    ".jsonl.zst": lambda path, numbers: path.write_bytes(pa.Codec("zstd").compress(lines(*numbers), asbytes=True)),
    ".parquet": lambda path, numbers: pq.write_table(pa.table({"n": numbers}), path),
    ".arrow": arrow_stream,
    ".feather": lambda path, numbers: pyarrow.feather.write_feather(pa.table({"n": numbers}), path),
}


def numbers(source):
    return [row["n"] for _, row in read_rows(source)]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(lines(len(name)))


def message(source):
    with pytest.raises(UserError) as error:
        list(read_rows(source))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", SHARDS)
def test_folders_and_patterns_of_shards_are_read_in_natural_order(tmp_path, suffix):
    for shard in (10, 2, 1):
        SHARDS[suffix](tmp_path / f"part-{shard}{suffix}", [shard, shard + 100])
    for name in ("README.md", ".hidden.jsonl", "_SUCCESS", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    expected = [1, 101, 2, 102, 10, 110]
    assert numbers(tmp_path) == numbers(f"{tmp_path}/part-*{suffix}") == expected
    assert [number for number, _ in read_rows(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_digits_that_are_no_numbers_are_sorted_as_text(tmp_path):
    for n in (10, 2):
        (tmp_path / f"1²{n}.jsonl").write_bytes(lines(n))
    assert numbers(tmp_path) == [2, 10]


def test_a_bad_row_of_a_shard_is_named_in_the_folder_and_in_its_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(1, 2))
    (tmp_path / "b.jsonl").write_bytes(lines(3) + b"{\n")
    assert "b.jsonl row 4 (row 2 of this file) does not parse as JSON" in message(tmp_path)


def test_lists_are_read_in_the_order_given(tmp_path):
    for name, n in (("b.jsonl", 1), ("a.jsonl", 2), ("p-1.jsonl", 3), ("p-2.jsonl", 4)):
        (tmp_path / name).write_bytes(lines(n))
    assert numbers(f"{tmp_path}/b.jsonl, {tmp_path}/a.jsonl,{tmp_path}/p-*.jsonl") == [1, 2, 3, 4]
    assert f"read as a list of 2 sources, of which {tmp_path}/c does not exist" in message(
        f"{tmp_path}/a.jsonl,{tmp_path}/c"
    )
    assert "of which one is empty" in message(f"{tmp_path}/a.jsonl,")
    assert "names" in (said := message(f"{tmp_path}/a.jsonl,{tmp_path}/*.jsonl")) and "more than once" in said


@pytest.mark.parametrize("name", ["a,b.jsonl", "a*.jsonl", "a[1].jsonl", "a?,[x]*.jsonl"])
def test_an_existing_path_is_neither_a_list_nor_a_pattern(tmp_path, name):
    touch(tmp_path, "a.jsonl", "a1.jsonl")
    (tmp_path / name).write_bytes(lines(7))
    assert numbers(tmp_path / name) == numbers(str(tmp_path / name)) == [7]
    assert source_identity(tmp_path / name)["file"] == name


def test_names_that_look_like_patterns_and_lists_are_given_so_that_they_can_be_read(tmp_path):
    folder = tmp_path / "v[1]"
    folder.mkdir()
    for name in ("a,b-train-1.jsonl", "a,b-train-2.jsonl", "c[0]-test.jsonl"):
        (folder / name).write_bytes(lines(1))
    given = message(folder).split("'")[1::2]
    assert [len(numbers(source)) for source in given] == [2, 1]


def test_no_source_at_all_and_broken_links(tmp_path):
    assert message("") == message(" ") == "no pairs are named: the source is empty"
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "absent")
    assert f"{tmp_path}/a.jsonl cannot be read: No such file" in message(tmp_path)


def test_patterns_that_match_nothing_or_folders(tmp_path):
    assert "is a pattern that no file matches" in message(f"{tmp_path}/*.jsonl")
    touch(tmp_path, "b-2/x.jsonl", "b-10/x.jsonl")
    (tmp_path / "b-2" / "x.jsonl").write_bytes(lines(2))
    (tmp_path / "b-10" / "x.jsonl").write_bytes(lines(10))
    assert numbers(f"{tmp_path}/b-*") == numbers(f"{tmp_path}/**/*.jsonl") == [2, 10]


def test_identities_tell_sources_apart(tmp_path):
    touch(tmp_path, "a.jsonl", "bb.jsonl", "c/a.jsonl")
    sources = ["a.jsonl", "a.jsonl,bb.jsonl", "bb.jsonl,a.jsonl", "*.jsonl", "c"]
    given = [",".join(f"{tmp_path}/{part}" for part in source.split(",")) for source in sources]
    identities = [source_identity(source) for source in given]
    assert [identity["file"] for identity in identities] == sources
    assert len({identity["sha256"] for identity in identities}) == len(sources)
    before = source_identity(given[3])
    (tmp_path / "bb.jsonl").write_bytes(lines(99))
    assert source_identity(given[3]) != before


SEVERAL_SPLITS = [
    (
        ["train-00000-of-00001.parquet", "test-00000-of-00001.parquet"],
        {"train": "train-*.parquet", "test": "test-*.parquet"},
    ),
    (["train-0.jsonl.gz", "train-1.jsonl.gz", "dev.jsonl.gz"], {"train": "train-*.jsonl.gz", "dev": "dev.jsonl.gz"}),
    (["pairs_train.jsonl", "pairs_eval.jsonl"], {"train": "pairs_train.jsonl", "eval": "pairs_eval.jsonl"}),
    (["a.train.json", "a.validation.json"], {"train": "a.train.json", "validation": "a.validation.json"}),
    (["0-train.csv", "1-train.csv", "0-test.csv"], {"train": "*-train.csv", "test": "0-test.csv"}),
    (["Train.jsonl", "TEST.jsonl"], {"train": "Train.jsonl", "test": "TEST.jsonl"}),
    (
        [f"{name}-0000{i}-of-00002.parquet" for name in ("train_prefs", "train_sft", "test_prefs") for i in "01"],
        {name: f"{name}-*.parquet" for name in ("train_prefs", "train_sft", "test_prefs")},
    ),
    (["helpful.jsonl", "harmless.jsonl", "test.jsonl"], {"test": "test.jsonl", "files without a split": "h*.jsonl"}),
    (["part-1.jsonl", "part-2.jsonl"], None),
    (["test-1.jsonl", "test-2.jsonl"], None),
    (["latest-1.jsonl", "greatest-2.jsonl", "devices.jsonl", "training.jsonl"], None),
]


@pytest.mark.parametrize("names, expected", SEVERAL_SPLITS)
def test_names_that_tell_of_several_splits(tmp_path, names, expected):
    assert patterns_by_split(names) == (expected or {})
    if expected:
        for name in names:
            (tmp_path / name).write_bytes(lines(1))
        for source in (tmp_path, f"{tmp_path}/*"):
            said = message(source)
            assert said.startswith(f"{source} holds several splits (")
            assert all(split in said and f"'{tmp_path}/{pattern}'" in said for split, pattern in expected.items())
        matched = [numbers(f"{tmp_path}/{pattern}") for pattern in expected.values()]
        assert sum(map(len, matched)) == len(names)


def test_splits_in_folders_are_not_mixed_either(tmp_path):
    touch(tmp_path, "train/a.jsonl", "test/a.jsonl")
    assert "holds several splits (train, test)" in message(f"{tmp_path}/*/*.jsonl")
    assert len(numbers(f"{tmp_path}/train/*.jsonl,{tmp_path}/test/*.jsonl")) == 2


def test_the_top_of_a_cloned_repository_names_what_to_give(tmp_path):
    touch(tmp_path, "README.md", "data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl", ".git/x.jsonl")
    assert message(tmp_path) == (
        f"{tmp_path} holds its data in folders: give '{tmp_path}/data/train-*.jsonl', "
        f"'{tmp_path}/data/test-*.jsonl'; several are given with commas between them"
    )
    assert len(numbers(f"{tmp_path}/data/train-*.jsonl")) == 1


def test_folders_below_are_given_whole_where_they_can_be_read(tmp_path):
    touch(tmp_path, "one/a.jsonl", "one/b.jsonl", "two/x.parquet", "two/y.jsonl", "saved/state.json")
    assert all(f"'{tmp_path}/{name}'" in message(tmp_path) for name in ("one", "two/*.jsonl", "two/*.parquet", "saved"))


def test_folders_that_cannot_be_read_say_what_they_hold(tmp_path):
    assert "it is empty" in message(tmp_path)
    touch(tmp_path, "README.md", "notes.txt")
    assert "it holds README.md, notes.txt" in message(tmp_path)
    touch(tmp_path, "a.jsonl", "b.json")
    assert f"several kinds: 1 JSON (b.json), 1 JSONL (a.jsonl); give one kind, such as '{tmp_path}/*.jsonl'" in message(
        tmp_path
    )
    touch(tmp_path, "tokenizer_config.json")
    assert "is the folder of a model" in message(tmp_path)


def test_absent_shards_are_named(tmp_path):
    touch(tmp_path, "train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl")
    assert f"{tmp_path} lacks train-00001-of-00003: " in message(tmp_path)
    assert len(numbers(f"{tmp_path}/*.jsonl")) == 2
    assert missing_shards(["a-00000-of-00001.parquet", "b-00001-of-00002-0f.parquet"]) == ["b-00000-of-00002"]


def test_a_shard_and_its_compressed_copy_are_not_both_read(tmp_path):
    touch(tmp_path, "a.jsonl")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(1)))
    assert "holds a.jsonl both as it is and compressed" in message(tmp_path)
