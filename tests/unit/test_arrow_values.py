"""Arrow columns are handed out as JSON would hold them, or refused by name and type."""

import datetime
import decimal
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from treg_megatron.data.pairs import read_pairs
from treg_megatron.data.records import read_rows
from treg_megatron.errors import UserError

MESSAGES = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": [{"type": "text", "text": "A"}]}]


def json_array(*values):
    texts = [None if value is None else json.dumps(value) for value in values]
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))


def write_parquet(path, table):
    pq.write_table(table, path)


def write_arrow(path, table):
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)


@pytest.fixture(params=[write_parquet, write_arrow])
def rows_of(request, tmp_path):
    def rows(**columns):
        request.param(tmp_path / "pairs", pa.table(columns))
        return [row for _, row in read_rows(tmp_path / "pairs")]

    return rows


def refusal(rows_of, **columns):
    with pytest.raises(UserError) as error:
        rows_of(**columns)
    assert "\n" not in str(error.value) and "pairs" in str(error.value)
    return str(error.value)


def test_json_columns_are_decoded(rows_of):
    values = ["Robin.", 42, MESSAGES, {"a": None}, None, 'text with "quotes"']
    assert [row["a"] for row in rows_of(a=json_array(*values))] == values


def test_json_is_decoded_inside_lists_and_structs(rows_of):
    contents = json_array("Q", [{"type": "text", "text": "A"}])
    struct = pa.StructArray.from_arrays([pa.array(["user", "assistant"]), contents], ["role", "content"])
    messages = pa.ListArray.from_arrays(pa.array([0, 2]), struct)
    nested = pa.ListArray.from_arrays(pa.array([0, 1]), messages)
    assert rows_of(chosen=messages, nested=nested) == [{"chosen": MESSAGES, "nested": [MESSAGES]}]


def test_what_datasets_writes_gives_the_same_pairs_as_its_jsonl(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"prompt": "Name a fish.", "chosen": ["Cod."], "rejected": "Bat."},
        {"prompt": "Name a bird.", "chosen": "Robin.", "rejected": "Bat."},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = datasets.load_dataset("json", data_files=str(tmp_path / "p.jsonl"), split="train")
    dataset.to_parquet(tmp_path / "p.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    assert "Json" in str(dataset.features)
    for name in ("p.jsonl", "p.parquet", "saved"):
        assert [row for _, row in read_rows(tmp_path / name)] == rows


def test_parquet_that_says_json_without_arrow_is_decoded(tmp_path):
    pq.write_table(pa.table({"a": json_array("Robin.")}), tmp_path / "p", store_schema=False)
    assert [row for _, row in read_rows(tmp_path / "p")] == [{"a": "Robin."}]


def test_an_extension_that_pyarrow_does_not_know_is_known_by_its_metadata(rows_of, tmp_path):
    def column(name):
        field = pa.field("a", pa.string(), metadata={"ARROW:extension:name": name})
        return pa.table([pa.array(['"Robin."'])], schema=pa.schema([field]))

    write_parquet(tmp_path / "p", column("arrow.json"))
    assert [row for _, row in read_rows(tmp_path / "p")] == [{"a": "Robin."}]
    write_parquet(tmp_path / "p", column("own.words"))
    with pytest.raises(UserError, match="column 'a' has the extension type own.words, which is not read; leave this"):
        list(read_rows(tmp_path / "p"))


def test_a_struct_of_lists_becomes_messages(rows_of, tmp_path):
    columns = {"role": ["user", "assistant"], "content": ["Q", "A"]}
    turned = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    sharegpt = {"from": ["human"], "value": ["Q"]}
    uneven = {"role": ["user"], "content": []}
    assert rows_of(a=[columns, None], b=[[columns], []], c=[sharegpt, sharegpt], d=[uneven, uneven]) == [
        {"a": turned, "b": [turned], "c": [{"from": "human", "value": "Q"}], "d": uneven},
        {"a": None, "b": [], "c": [{"from": "human", "value": "Q"}], "d": uneven},
    ]
    other = {"text": ["a"], "label": ["b"]}
    assert rows_of(a=[other]) == [{"a": other}]


def test_a_sequence_of_messages_is_read_as_pairs(tmp_path):
    answers = [{"role": ["user", "assistant"], "content": ["Q", answer]} for answer in ("good", "bad")]
    write_parquet(tmp_path / "p", pa.table({"chosen": [answers[0]], "rejected": [answers[1]]}))
    (pair,) = read_pairs(tmp_path / "p")
    assert (pair.chosen, pair.rejected) == ("good", "bad")


def test_numbers_and_times_are_as_in_json(rows_of):
    day = datetime.datetime(2026, 11, 26, 12)
    (row,) = rows_of(
        price=pa.array([decimal.Decimal("2.50")]),
        count=pa.array([decimal.Decimal("3")], pa.decimal128(10, 0)),
        score=[math.nan],
        half=pa.array([1.5], pa.float32()),
        day=pa.array([day.date()]),
        at=pa.array([day], pa.timestamp("us")),
        text=pa.array([b"M\xc3\xb6we"], pa.binary()),
        kind=pa.array(["a"]).dictionary_encode(),
        large=pa.array([["a"]], pa.large_list(pa.large_string())),
        nothing=pa.nulls(1),
        flag=[True],
    )
    assert math.isnan(row.pop("score"))
    assert (type(row["count"]), type(row["price"])) == (int, float)
    assert json.loads(json.dumps(row)) == row
    assert (row["price"], row["count"], row["text"], row["at"]) == (2.5, 3, "Möwe", "2026-11-26T12:00:00")


def test_half_precision_numbers_are_numbers(tmp_path):
    import numpy as np

    write_arrow(tmp_path / "p", pa.table({"a": pa.array(np.array([1.5], np.float16))}))
    assert [type(row["a"]) for _, row in read_rows(tmp_path / "p")] == [float]


@pytest.mark.parametrize(
    "column, expected",
    [
        (pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string())), "column 'x' has the type map<string, string"),
        (pa.array([[[("a", 1)]]], pa.list_(pa.map_(pa.string(), pa.int8()))), "column 'x' has the type map<string"),
        (pa.array([b"\x89PNG"]), "row 1: column 'x' holds bytes that are not text"),
        (pa.array([{"bytes": b"\x89PNG", "path": "a"}]), "row 1: column 'x.bytes' holds bytes that are not text"),
        (pa.ExtensionArray.from_storage(pa.json_(), pa.array(["{"])), "column 'x' is of type arrow.json, but holds"),
        (
            pa.FixedShapeTensorArray.from_storage(
                pa.fixed_shape_tensor(pa.int8(), [1]), pa.array([[1]], pa.list_(pa.int8(), 1))
            ),
            "column 'x' has the extension type arrow.fixed_shape_tensor",
        ),
    ],
)
def test_what_json_cannot_hold_is_refused_by_column(rows_of, column, expected):
    assert expected in refusal(rows_of, prompt=["Q"], x=column)


def test_no_bytes_at_all_are_no_obstacle(rows_of):
    images = pa.array([None], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    assert rows_of(prompt=["Q"], images=images) == [{"prompt": "Q", "images": None}]
