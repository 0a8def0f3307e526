"""Labelled pairs on disk: they may come from any program, so everything is validated."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from treg_megatron.data.labelled_pairs import (
    MANIFEST_FORMAT,
    LabelledPair,
    columns_beside,
    labelled_files,
    labelling_run,
    read_labelled,
    read_shard_metadata,
    write_shard,
)
from treg_megatron.errors import UserError
from treg_megatron.utils.files import write_manifest

GOOD = {
    "pair_id": ["a", "b"],
    "chosen_tokens": [[1, 2, 3, 4], [5, 6]],
    "rejected_tokens": [[1, 2, 9], [5, 7, 8]],
    "chosen_token_rewards": [[0.1, -0.5], [0.5]],
    "rejected_token_rewards": [[0.0], [0.25, 0.25]],
    "chosen_ref_logprobs": [[-1.0, -2.0], [0.0]],
    "rejected_ref_logprobs": [[-3.0], [-4.0, -5.0]],
}


def changed(**columns):
    return {name: values for name, values in {**GOOD, **columns}.items() if values is not None}


def write(path, columns, **types):
    pq.write_table(pa.table({name: pa.array(values, types.get(name)) for name, values in columns.items()}), path)
    return path


def as_lists(pair: LabelledPair) -> dict:
    return {
        f.name: v.tolist() if isinstance(v := getattr(pair, f.name), np.ndarray) else v
        for f in dataclasses.fields(pair)
        if not f.name.endswith("_values")
    } | {
        f"{side} {name}": v.tolist()
        for side in ("chosen", "rejected")
        for name, v in getattr(pair, f"{side}_values").items()
    }


def test_what_is_written_is_read(tmp_path):
    pairs = [
        LabelledPair(
            "a",
            *(
                np.array(v, dtype=t)
                for v, t in (
                    ([1, 2, 3], np.int32),
                    ([1, 4], np.int32),
                    ([0.5, -0.25], np.float32),
                    ([0.125], np.float32),
                    ([-1, -2], np.float32),
                    ([-3], np.float32),
                )
            ),
            chosen_score=1.5,
            prompt="Q",
            chosen="x",
            rejected="\u00e9",
        )
    ]
    write_shard(tmp_path / "s.parquet", pairs, {"run": {"x": 1}})
    (read,) = read_labelled(tmp_path)
    assert as_lists(read) == as_lists(pairs[0])
    assert read.chosen_tokens.dtype == np.int32 and read.chosen_ref_logprobs.dtype == np.float32
    assert read_shard_metadata(tmp_path / "s.parquet") == {"run": {"x": 1}}


def test_wider_types_and_missing_reference_are_accepted(tmp_path):
    path = write(
        tmp_path / "own.parquet",
        changed(chosen_ref_logprobs=None, rejected_ref_logprobs=None),
        chosen_tokens=pa.large_list(pa.int64()),
        chosen_token_rewards=pa.list_(pa.float64()),
    )
    first, second = read_labelled(path)
    assert first.chosen_tokens.tolist() == [1, 2, 3, 4] and first.chosen_tokens.dtype == np.int32
    assert second.chosen_token_rewards.tolist() == [0.5] and second.chosen_ref_logprobs is None
    assert labelling_run(path) is None


def test_some_pairs_may_have_a_weight(tmp_path):
    first, second = read_labelled(write(tmp_path / "own.parquet", changed(pair_weight=[float("nan"), 0.5])))
    assert (first.pair_weight, second.pair_weight) == (None, 0.5)
    write_shard(tmp_path / "weighted.parquet", [first, second], weighted=True)
    assert [pair.pair_weight for pair in read_labelled(tmp_path / "weighted.parquet")] == [None, 0.5]
    write_shard(tmp_path / "plain.parquet", [first])
    assert "pair_weight" not in pq.read_schema(tmp_path / "plain.parquet").names


def test_further_token_rewards_have_names(tmp_path):
    named = {"chosen_token_rewards_x": [[0.25, 0.5], [0.0]], "rejected_token_rewards_x": [[-0.5], [0.125, 0.0]]}
    named |= {name.replace("_x", "_b2"): [[-v for v in row] for row in rows] for name, rows in named.items()}
    pairs = list(read_labelled(write(tmp_path / "own.parquet", changed(pair_weight=[0.5, 2.0], **named))))
    write_shard(tmp_path / "s.parquet", pairs, weighted=True)
    again = list(read_labelled(tmp_path / "s.parquet"))
    assert list(map(as_lists, again)) == list(map(as_lists, pairs))
    assert again[1].rejected_values["x"].tolist() == [0.125, 0.0] and again[1].rejected_values["x"].dtype == np.float32
    assert list(again[0].chosen_values) == ["b2", "x"]
    beside = ["token rewards named b2, x", "weights of pairs from 0.5 to 2"]
    assert columns_beside(tmp_path / "s.parquet") == beside and columns_beside(write(tmp_path / "p", GOOD)) == []
    [_, second] = read_labelled(tmp_path / "s.parquet", values="b2")
    assert second.rejected_token_rewards.tolist() == [-0.125, 0.0]
    with pytest.raises(UserError, match="s.parquet has no token rewards named c, only b2, x"):
        list(read_labelled(tmp_path / "s.parquet", values="c"))


def test_an_empty_shard_is_read(tmp_path):
    write_shard(tmp_path / "s.parquet", [], {"run": {}})
    assert list(read_labelled(tmp_path / "s.parquet")) == []


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"chosen_tokens": None}, "lacks column chosen_tokens"),
        ({"pair_id": None}, "lacks column pair_id"),
        ({"chosen_ref_logprobs": None}, "has only one of the columns chosen_ref_logprobs, rejected_ref_logprobs"),
        ({"chosen_tokens": [[1.0, 2.0], [3.0, 4.0]]}, "column chosen_tokens must hold lists of integers"),
        ({"chosen_token_rewards": ["x", "y"]}, "column chosen_token_rewards must hold lists of floating-point numbers"),
        ({"pair_id": [1, 2]}, "column pair_id must hold text"),
        ({"pair_id": ["a", None]}, "row 2: pair_id is empty"),
        ({"chosen_tokens": [[1, 2, 3, 4], None]}, "row 2 (pair_id 'b'): chosen_tokens is null"),
        ({"chosen_tokens": [[1, 2, 3, 4], [5, None]]}, "row 2 (pair_id 'b'): chosen_tokens holds a null"),
        ({"rejected_tokens": [[1, 2, -9], [5, 7, 8]]}, "row 1 (pair_id 'a'): rejected_tokens holds a negative id"),
        ({"chosen_tokens": [[1, 2, 3, 4], [5, 1 << 40]]}, "chosen_tokens, in this row or one of the 1 after it"),
        ({"chosen_token_rewards": [[0.1, -0.5], []]}, "row 2 (pair_id 'b'): chosen_token_rewards is empty"),
        (
            {"chosen_token_rewards": [[0.1, -0.5], [0.1, 0.2]]},
            "row 2 (pair_id 'b'): chosen_token_rewards has 2 values for 2 tokens",
        ),
        (
            {"chosen_token_rewards": [[0.1, -0.6], [0.5]]},
            "row 1 (pair_id 'a'): chosen_token_rewards holds a value outside",
        ),
        (
            {"rejected_token_rewards": [[0.0], [0.25, float("nan")]]},
            "row 2 (pair_id 'b'): rejected_token_rewards holds a value outside",
        ),
        (
            {"rejected_ref_logprobs": [[-3.0], [-4.0]]},
            "row 2 (pair_id 'b'): rejected_ref_logprobs has 1 values, rejected_token_rewards 2",
        ),
        (
            {"rejected_ref_logprobs": [[3.0], [-4.0, -5.0]]},
            "row 1 (pair_id 'a'): rejected_ref_logprobs holds a value that is not a finite log-prob",
        ),
        (
            {"rejected_ref_logprobs": [[-float("inf")], [-4.0, -5.0]]},
            "row 1 (pair_id 'a'): rejected_ref_logprobs holds a value that is not a finite log-prob",
        ),
        (
            {"pair_weight": [None, 1001.0]},
            "row 2 (pair_id 'b'): pair_weight is 1001: it must be a number from 0 to 1000",
        ),
        ({"chosen_token_rewards_x": [[0.1, 0.1], [0.1]]}, "column chosen_token_rewards_x, but none for rejected"),
        (
            {"chosen_token_rewards_x": [[0.1], [0.1]], "rejected_token_rewards_x": [[0.0], [0.1, 0.1]]},
            "row 1 (pair_id 'a'): chosen_token_rewards_x has 1 values, chosen_token_rewards 2",
        ),
        (
            {"chosen_token_rewards_x": [[0.1, 0.2], [0.1]], "rejected_token_rewards_x": [[0.0], [0.1, 0.7]]},
            "row 2 (pair_id 'b'): rejected_token_rewards_x holds a value outside [-0.5, 0.5]",
        ),
        (
            {"chosen_token_rewards_x": [[0.1, -9.0], [0.1]], "rejected_token_rewards_x": [[0.0], [0.1, 0.1]]},
            "row 1 (pair_id 'a'): chosen_token_rewards_x marks other tokens as not scored than chosen_token_rewards",
        ),
        ({"pair_weight": ["1", "2"]}, "column pair_weight must hold a number"),
        ({"rejected_tokens": [[1, 7, 9], [5, 7, 8]]}, "row 1 (pair_id 'a'): the prompts of the two sides differ"),
    ],
)
def test_invalid_columns_and_values_are_named(tmp_path, columns, message):
    path = write(tmp_path / "own.parquet", changed(**columns))
    with pytest.raises(UserError) as error:
        list(read_labelled(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_rows_are_counted_through_batches(tmp_path):
    count = 3000
    columns = {name: [values[0]] * count for name, values in GOOD.items()}
    columns["chosen_token_rewards"] = [[0.1, -0.5]] * (count - 1) + [[0.1, 7.0]]
    with pytest.raises(UserError, match="row 3000 "):
        list(read_labelled(write(tmp_path / "own.parquet", columns)))


def test_cut_or_foreign_files_are_refused(tmp_path):
    path = write(tmp_path / "own.parquet", GOOD)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        list(read_labelled(path))
    with pytest.raises(UserError, match="do not exist"):
        list(read_labelled(tmp_path / "absent"))
    path.unlink()
    with pytest.raises(UserError, match="holds no .parquet files"):
        list(read_labelled(tmp_path))


def test_files_come_in_natural_order(tmp_path):
    for number in (10, 2, 1):
        write(tmp_path / f"part-{number}.parquet", GOOD)
    assert [file.stem for file in labelled_files(tmp_path)] == ["part-1", "part-2", "part-10"]


def test_a_run_is_believed_only_when_it_is_complete(tmp_path):
    write_shard(tmp_path / "shard-00000.parquet", [], {"run": {"x": 1}})
    with pytest.raises(UserError, match="its labelling job is unfinished"):
        labelling_run(tmp_path)
    shard = {"file": "shard-00000.parquet", "pairs": 0}
    for shards, message in (
        ([shard, {"file": "shard-00001.parquet", "pairs": 0}], "shard-00001.parquet is missing"),
        ([], "shard-00000.parquet is not listed"),
        ([{**shard, "pairs": 5}], "manifest says 5"),
    ):
        write_manifest(tmp_path / "manifest.json", MANIFEST_FORMAT, 1, {"run": {"x": 1}, "shards": shards})
        with pytest.raises(UserError, match=message):
            labelling_run(tmp_path)
    write_manifest(tmp_path / "manifest.json", MANIFEST_FORMAT, 1, {"run": {"x": 1}, "shards": [shard]})
    assert labelling_run(tmp_path) == {"x": 1}
    assert labelling_run(tmp_path / "shard-00000.parquet") == {"x": 1}
