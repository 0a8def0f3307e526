"""One file of each kind under tests/data/pairs: all of them give the same pairs."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from treg_megatron.data.inspection import as_text, inspect_pairs
from treg_megatron.data.pairs import EQUAL_SCORES, Reading, read_pairs
from treg_megatron.data.records import read_rows, source_identity
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.conversation import Message

FOLDER = Path(__file__).resolve().parents[1] / "data" / "pairs"
FILES = {  # kind, and how many of the six pairs it can represent: plain text has no turns, HH no system message
    "trl_text.jsonl": ("trl", 4),
    "trl_messages.jsonl.gz": ("trl", 6),
    "trl_implicit_text.jsonl": ("trl_implicit_text", 4),
    "trl_implicit_messages.json": ("trl_implicit", 6),
    "ultrafeedback.parquet": ("ultrafeedback", 6),
    "simpo.jsonl.zst": ("simpo", 4),
    "nemo_rl.jsonl": ("nemo_rl", 6),
    "nemo_aligner.jsonl": ("nemo_aligner", 4),
    "swift.jsonl": ("swift", 6),
    "sharegpt.json": ("sharegpt", 6),
    "hh.jsonl": ("hh", 5),
    "arrow": ("trl", 6),
}


def content(pairs):
    return [(pair.pair_id, pair.messages, pair.chosen, pair.rejected) for pair in pairs]


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_pairs(name):
    kind, count = FILES[name]
    expected = content(read_pairs(FOLDER / "trl_messages.jsonl.gz"))[:count]
    assert len(expected) == count
    assert content(read_pairs(FOLDER / name, reading=Reading(kind))) == expected
    if kind != "trl_implicit_text":
        assert content(read_pairs(FOLDER / name)) == expected
        assert inspect_pairs(FOLDER / name)["format"] == kind


def as_table(rows):
    return pa.table({key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)})


def write_arrow_folder(folder, rows):
    """Write the part of ``datasets``' ``save_to_disk`` format that the reader uses."""
    folder.mkdir()
    table = as_table(rows)
    with pa.ipc.new_stream(str(folder / "data.arrow"), table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CONTAINERS = {
    "json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "jsonl": lambda path, rows: path.write_bytes(lines(rows)),
    "gzip": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "zstd": lambda path, rows: path.write_bytes(pa.Codec("zstd").compress(lines(rows), asbytes=True)),
    "parquet": lambda path, rows: pq.write_table(as_table(rows), path),
    "arrow": write_arrow_folder,
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", FILES)
def test_every_format_in_every_kind_of_file(name, container, tmp_path):
    rows, reading = [row for _, row in read_rows(FOLDER / name)], Reading(FILES[name][0])
    CONTAINERS[container](tmp_path / "pairs", rows)
    assert content(read_pairs(tmp_path / "pairs", reading=reading)) == content(
        read_pairs(FOLDER / name, reading=reading)
    )


def test_scores_are_kept_under_the_names_of_each_format():
    for name, scores in (
        ("ultrafeedback.parquet", (8.0, 2.0)),
        ("simpo.jsonl.zst", (0.9, -0.3)),
        ("nemo_aligner.jsonl", (5.0, 1.0)),
    ):
        first = next(read_pairs(FOLDER / name))
        assert (first.chosen_score, first.rejected_score) == scores


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"chosen": CHAT, "rejected": [{"role": "user", "content": "other"}, CHAT[1]]}, "the same conversation up to"),
        ({"chosen": CHAT + CHAT[:1], "rejected": CHAT + CHAT[:1]}, "chosen must end with an assistant turn"),
        ({"prompt": "other", "chosen": CHAT, "rejected": CHAT}, "prompt is not among the user turns of chosen"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
            "the same conversation up to a turn of the assistant",
        ),
        ({"prompt": "a", "all_generated_responses": ["x"], "all_rm_scores": [1, 2]}, "lists of the same length"),
        ({"prompt": "a", "all_generated_responses": ["x", "y"], "all_rm_scores": [1, "2"]}, "must hold numbers"),
        (
            {"context": CHAT[:1], "completions": [{"rank": 0, "completion": "x"}]},
            "at least two, each with an integer rank",
        ),
        ({"prompt": "<extra_id_1>User", "chosen_response": "x", "rejected_response": "y"}, "already carries a chat"),
        ({"messages": CHAT, "rejected_messages": CHAT[:1]}, "the same conversation up to a turn of the assistant"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path, row, message):
    path = jsonl(tmp_path / "p.jsonl", row)
    with pytest.raises(UserError, match="p.jsonl row 1: ") as error:
        list(read_pairs(path))
    assert message in str(error.value)


def test_answers_without_a_preference_are_counted(tmp_path):
    rows = [{"prompt": "a", "all_generated_responses": ["x", "y"], "all_rm_scores": s} for s in ([1, 1], [2, 1])]
    report = inspect_pairs(jsonl(tmp_path / "p", *rows))
    assert report["drops"] == {EQUAL_SCORES: 1} and report["pairs"] == 1


def test_text_with_a_common_prefix_is_split_between_words(tmp_path):
    implicit = Reading("trl_implicit_text")
    path = jsonl(tmp_path / "p", {"chosen": "Say\n it: carrot", "rejected": "Say\n it: card"})
    (pair,) = read_pairs(path, reading=implicit)
    assert (pair.messages, pair.chosen, pair.rejected) == ((Message("user", "Say\n it:"),), "carrot", "card")
    for row, message in (
        ({"chosen": "good", "rejected": "bad"}, "no common prefix"),
        ({"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: a\n\nAssistant: c"}, "holds several turns"),
    ):
        with pytest.raises(UserError, match=message):
            list(read_pairs(jsonl(tmp_path / "p", row), reading=implicit))


def test_the_report_counts_unusable_rows_and_continues(tmp_path, chatml):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": ""},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        {"prompt": "a", "chosen": "good", "rejected": "bad", "chosen_score": 1, "rejected_score": 2},
    ]
    report = inspect_pairs(jsonl(tmp_path / "p", *rows, rows[2]), tokenizer=chatml, max_length=3)
    assert (report["pairs"], report["unusable"], report["chosen_scored_lower"], report["too_long"]) == (1, 1, 1, 1)
    text = as_text(report)
    assert "row 1: rejected is an empty response (read as trl)" in text and "left out: 1 identical responses" in text
    assert "tokens of prompt: minimum" in text
    with pytest.raises(UserError, match="no row can be used"):
        inspect_pairs(jsonl(tmp_path / "q", rows[0]))


def test_folders_of_parquet_count_rows_through_their_files(tmp_path):
    for number, prompt in ((10, ""), (2, "b"), (1, "a")):
        pq.write_table(
            pa.table({"prompt": [prompt or 3.5], "chosen": ["x"], "rejected": ["y"]}),
            tmp_path / f"part-{number}.parquet",
        )
    assert [number for number, _ in read_rows(tmp_path)] == [1, 2, 3]
    with pytest.raises(UserError, match="row 3: prompt must be a list of messages, got float"):
        list(read_pairs(tmp_path))
    assert source_identity(tmp_path)["file"] == tmp_path.name
    (tmp_path / "part-2.parquet").write_bytes((tmp_path / "part-2.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match="part-2.parquet cannot be read after row 1"):
        list(read_pairs(tmp_path))


def test_folders_without_pairs(tmp_path):
    with pytest.raises(UserError, match="holds neither .parquet files nor a dataset"):
        list(read_pairs(tmp_path))
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(UserError, match="holds the splits train: name one of them, such as .*train"):
        list(read_pairs(tmp_path))
    (tmp_path / "state.json").write_text("[]")
    (tmp_path / "dataset_dict.json").unlink()
    with pytest.raises(UserError, match="state.json is not what save_to_disk writes"):
        list(read_pairs(tmp_path))


def test_unknown_names_of_formats_and_hub_datasets(tmp_path):
    with pytest.raises(UserError, match="format 'csv' is not known; choose auto or one of sharegpt, "):
        list(read_pairs(FOLDER / "hh.jsonl", reading=Reading("csv")))
    with pytest.raises(UserError, match="hub:nothing is not of the form"):
        list(read_pairs("hub:nothing"))
    with pytest.raises(UserError, match="a hub dataset is written hub:OWNER/NAME"):
        list(read_pairs("owner/name"))


def test_hub_datasets_are_loaded_by_name_revision_and_split(monkeypatch):
    asked = []

    class Loaded(list):
        _fingerprint = "f00d"

    class Builder(NamedTuple):
        name: str
        revision: str | None

        def download_and_prepare(self):
            pass

        def as_dataset(self, split):
            asked.append((*self, split))
            if split == "absent":
                raise ValueError("Unknown split\n'absent'")
            return Loaded([{"prompt": "Q", "chosen": "a", "rejected": "b"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset_builder=Builder))
    assert len(list(read_pairs("hub:o/n"))) == len(list(read_pairs("hub:o/n@v1.0:test"))) == 1
    assert asked == [("o/n", None, "train"), ("o/n", "v1.0", "test")]
    assert source_identity("hub:o/n") == {"file": "hub:o/n", "sha256": "f00d"}
    with pytest.raises(UserError, match="split absent, cannot be loaded: ValueError: Unknown split 'absent'"):
        list(read_pairs("hub:o/n:absent"))
