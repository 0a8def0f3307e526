"""Streams on disk: they are read as written, and inconsistent files are not opened."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.labelled import THREE, pair
from treg_megatron.config.recipe import load_recipe
from treg_megatron.config.schema import IndexSection
from treg_megatron.data.aligned import PairRecord, stream_paths
from treg_megatron.data.collate import collate
from treg_megatron.data.indexed import IndexedWriter
from treg_megatron.data.labelled_pairs import LabelledPair, write_shard
from treg_megatron.data.streams import (
    in_validation,
    merge_streams,
    open_streams,
    require_same_tokenizer,
    split_streams,
    verify,
    write_streams,
)
from treg_megatron.errors import UserError
from treg_megatron.labelling.indexing import index


def assert_holds(record: PairRecord, expected: LabelledPair) -> None:
    for name, value in record._asdict().items():
        np.testing.assert_array_equal(value, getattr(expected, name))


sizes = st.integers(1, 12)


@settings(max_examples=30)
@given(lengths=st.lists(st.tuples(sizes, sizes, sizes), min_size=1, max_size=6), reference=st.booleans())
def test_streams_equal_what_was_written(chatml, tmp_path_factory, lengths, reference):
    prefix = tmp_path_factory.getbasetemp() / "round" / "train"
    pairs = [pair(f"pair {i}", *n, reference) for i, n in enumerate(lengths)]
    manifest = write_streams(prefix, pairs, chatml, {"source": "here"})
    streams = verify(prefix)
    assert len(streams) == len(pairs) == manifest["pairs"]
    for i, expected in enumerate(pairs):
        assert_holds(streams[i], expected)
        assert streams.sequence_lengths[i].tolist() == [len(expected.chosen_tokens), len(expected.rejected_tokens)]
        assert streams.response_lengths[i].tolist() == list(lengths[i][1:])
    assert stream_paths(prefix, "ref_logprobs")[0].exists() == reference
    assert not list(prefix.parent.glob(".*"))


def test_manifest_records_the_provenance_of_the_streams(chatml, tmp_path):
    write_streams(tmp_path / "t", THREE, chatml, {"prompt_pair": {"name": "revise"}})
    manifest = json.loads((tmp_path / "t.manifest.json").read_text())
    assert manifest["tokenizer"] == {
        "sha256": chatml.sha256,
        "chat_template_sha256": chatml.template_sha256,
        "vocab_size": chatml.vocab_size,
    }
    assert manifest["labels"] == {"prompt_pair": {"name": "revise"}}
    assert manifest["token_dtype"] == "uint16" and manifest["reference_logprobs"] is True
    assert manifest["alignment"].startswith("value t belongs to response token t")
    assert (manifest["pairs"], manifest["tokens"], manifest["response_tokens"], manifest["longest_sequence"]) == (
        3,
        7 + 8 + 2 + 8 + 8 + 8,
        21,
        8,
    )


def test_large_vocabularies_take_four_bytes(chatml, tmp_path, monkeypatch):
    monkeypatch.setattr(chatml, "vocab_size", 128_256)
    write_streams(tmp_path / "t", [pair("a", 3, 4, 5, vocab=128_256)], chatml)
    record = open_streams(tmp_path / "t")[0]
    assert record.chosen_tokens.dtype == np.int32
    assert_holds(record, pair("a", 3, 4, 5, vocab=128_256))


def test_streams_survive_a_process_boundary(chatml, tmp_path):
    write_streams(tmp_path / "t", THREE, chatml)
    pickled = pickle.dumps(open_streams(tmp_path / "t"))
    assert len(pickled) < 1000
    assert_holds(pickle.loads(pickled)[2], THREE[2])
    with pytest.raises(IndexError):
        open_streams(tmp_path / "t")[3]


def test_replaced_streams_leave_nothing_behind(chatml, tmp_path):
    write_streams(tmp_path / "t", THREE, chatml)
    write_streams(tmp_path / "t", [pair("a", 3, 4, 5, reference=False)], chatml)
    assert open_streams(tmp_path / "t")[0].chosen_ref_logprobs is None
    assert not any(path.exists() for path in stream_paths(tmp_path / "t", "ref_logprobs"))


@pytest.mark.parametrize(
    "pairs, message",
    [
        ([], "there are no pairs"),
        ([*THREE, THREE[0]], "pair_id 'a' occurs twice"),
        ([pair("a", 3, 4, 5, vocab=10_000)], "holds a token id that the tokenizer of"),
        ([THREE[0], pair("b", 1, 2, 3, reference=False)], "pair b lacks reference log-probs"),
        ([pair("b", 1, 2, 3, reference=False), THREE[0]], "pair a has reference log-probs"),
    ],
)
def test_bad_pairs_leave_no_files(chatml, tmp_path, pairs, message):
    with pytest.raises(UserError) as error:
        write_streams(tmp_path / "t", pairs, chatml)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_interrupted_writing_keeps_the_old_streams(chatml, tmp_path):
    write_streams(tmp_path / "t", THREE, chatml)

    def interrupted():
        yield pair("new", 1, 2, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_streams(tmp_path / "t", interrupted(), chatml)
    assert_holds(verify(tmp_path / "t")[0], THREE[0])
    assert not list(tmp_path.glob(".*"))


def replace_stream(prefix, name, dtype, documents):
    """Replace a stream with another valid one, and update its size and hashes in the manifest."""
    writer = IndexedWriter(*stream_paths(prefix, name), dtype)
    for document in documents:
        writer.add_document(document)
    files = writer.finish()
    manifest = json.loads((path := prefix.with_suffix(".manifest.json")).read_text())
    manifest["files"].update({f"{name}.{kind}": file for kind, file in files.items()})
    path.write_text(json.dumps(manifest))


def rewards(*lengths):
    return [np.zeros(n, np.float32) for n in lengths]


@pytest.mark.parametrize(
    "name, dtype, documents, message",
    [
        (
            "token_rewards",
            np.float32,
            [rewards(4, 5), rewards(1, 6), rewards(2, 2)],
            r"disagree: pair 1 \(b, rejected\): ref_logprobs has 7 values where token_rewards has 6",
        ),
        (
            "token_rewards",
            np.float32,
            [rewards(7, 5), rewards(1, 7), rewards(2, 2)],
            r"disagree: pair 0 \(a, chosen\): token_rewards has 7 values for 7 tokens",
        ),
        (
            "token_rewards",
            np.float32,
            [rewards(4, 5), rewards(1, 7), rewards(0, 2)],
            r"disagree: pair 2 \(\u03b3 3, chosen\): an empty response",
        ),
        ("token_rewards", np.float32, [rewards(4, 5), rewards(1, 7)], "does not hold 3 documents of 2 sequences"),
        ("token_rewards", np.float32, [rewards(4), rewards(5, 1, 7), rewards(2, 2)], "does not hold 3 documents of 2"),
        (
            "token_rewards",
            np.float64,
            [rewards(4, 5), rewards(1, 7), rewards(2, 2)],
            "holds float64 numbers instead of float32",
        ),
    ],
)
def test_streams_that_disagree_are_not_opened(chatml, tmp_path, name, dtype, documents, message):
    write_streams(tmp_path / "t", THREE, chatml)
    replace_stream(tmp_path / "t", name, dtype, documents)
    with pytest.raises(UserError, match=message):
        open_streams(tmp_path / "t")


def test_damaged_files_are_not_opened(chatml, tmp_path):
    prefix = tmp_path / "t"
    bin_path, idx_path = stream_paths(prefix, "tokens")

    def refused(path, content, message, check=open_streams):
        write_streams(prefix, THREE, chatml)
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            check(prefix)

    write_streams(prefix, THREE, chatml)
    manifest = prefix.with_suffix(".manifest.json")
    good_bin, good_idx, good_manifest = bin_path.read_bytes(), idx_path.read_bytes(), manifest.read_bytes()
    refused(bin_path, None, "t_tokens.bin does not exist")
    refused(bin_path, good_bin[:-1], "has 81 bytes, its manifest says 82")
    refused(idx_path, good_idx + b"x", "its manifest says")
    refused(idx_path, b"X" + good_idx[1:], "is not a Megatron index")
    refused(idx_path, good_idx[:17] + b"\x63" + good_idx[18:], "is not a Megatron index")
    refused(idx_path, good_idx[:34] + b"\x09" + good_idx[35:], "offsets do not follow from lengths")
    refused(idx_path, good_idx[:18] + b"\xff" * 8 + good_idx[26:], "does not fit its")
    refused(idx_path, good_idx[:-1] + b"\x01", "documents do not cover the sequences")
    refused(manifest, None, "t.manifest.json does not exist")
    refused(manifest, b"{", "cannot be read as a manifest")
    refused(manifest, b"{}", "is not a manifest of treg-megatron streams")
    refused(manifest, good_manifest.replace(b'"version": 1', b'"version": 9'), "has schema version 9")
    refused(bin_path, bytes([good_bin[0] ^ 1]) + good_bin[1:], "has changed since it was written", verify)


def test_index_step(chatml, tokenizer_folders, tmp_path):
    run = {"tokenizer": {"sha256": chatml.sha256}, "prompt_pair": {"name": "few_shot"}}
    write_shard(tmp_path / "own.parquet", THREE, {"run": run})
    section = IndexSection(
        str(tmp_path / "own.parquet"),
        str(tmp_path / "streams" / "train"),
        str(tokenizer_folders["chatml"]),
        workers=1,
        validation_fraction=0.0,
    )
    assert index(section)["labels"] == run
    streams = open_streams(section.output)
    assert [streams[i].pair_id for i in range(3)] == ["a", "b", "\u03b3 3"]
    require_same_tokenizer(streams.manifest, tokenizer_folders["chatml"])
    with pytest.raises(UserError, match="made with another tokenizer"):
        require_same_tokenizer(streams.manifest, tokenizer_folders["headers"])
    section.tokenizer = str(tokenizer_folders["headers"])
    with pytest.raises(UserError, match="own.parquet was made with another tokenizer"):
        index(section)


MANY = [pair(f"p{i}", 1 + i % 5, 1 + i % 7, 1 + i % 3) for i in range(40)]


def bytes_of(prefix):
    return {
        path.name.removeprefix(prefix.name): path.read_bytes()
        for path in prefix.parent.glob(f"{prefix.name}[._]*")
        if path.is_file()
    }


@pytest.mark.parametrize("workers", [3])
def test_streams_are_the_same_whatever_the_number_of_workers(chatml, tokenizer_folders, tmp_path, workers):
    for i, part in enumerate((MANY[:25], MANY[25:])):
        write_shard(tmp_path / "labelled" / f"part-{i}.parquet", part)
    for name, count in (("one", 1), ("several", workers)):
        index(
            IndexSection(
                str(tmp_path / "labelled"),
                str(tmp_path / name),
                str(tokenizer_folders["chatml"]),
                workers=count,
                validation_fraction=0.0,
            )
        )
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "several")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["labelled"]


def test_text_with_rewards_is_indexed_by_workers_in_its_order(tokenizer_folders, tmp_path):
    text = tmp_path / "own.jsonl"
    text.write_text(
        "".join(
            json.dumps(
                {
                    "id": f"p{i}",
                    "prompt": f"{i}?",
                    "chosen": "yes",
                    "rejected": "no " * (1 + i % 3),
                    "chosen_spans": [[0, 3, i / 400]],
                    "rejected_spans": [],
                }
            )
            + "\n"
            for i in range(150)
        )
    )
    for name, workers in (("one", 1), ("two", 2)):
        index(
            IndexSection(
                str(text),
                str(tmp_path / name),
                str(tokenizer_folders["chatml"]),
                workers=workers,
                validation_fraction=0.0,
            )
        )
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    streams = open_streams(tmp_path / "two")
    assert [streams.pair_id(i) for i in range(150)] == [f"p{i}" for i in range(150)]
    assert streams[100].chosen_token_rewards[0] == np.float32(0.25)


def test_merging_keeps_the_order_named(chatml, tmp_path):
    for name, part in (("part10", MANY[:10]), ("part9", MANY[10:30]), ("last", MANY[30:])):
        write_streams(tmp_path / name, part, chatml)
    write_streams(tmp_path / "whole", MANY, chatml)
    merge_streams(tmp_path / "merged", [tmp_path / name for name in ("part10", "part9", "last")])
    assert bytes_of(tmp_path / "merged") == bytes_of(tmp_path / "whole")
    with pytest.raises(UserError, match="pair_id 'p0' of .*part10 is also in an earlier part"):
        merge_streams(tmp_path / "twice", [tmp_path / "whole", tmp_path / "part10"])
    with pytest.raises(UserError, match="cannot be merged into itself"):
        merge_streams(tmp_path / "whole", [tmp_path / "whole"])
    write_streams(tmp_path / "free", [pair("x", 1, 2, 3, reference=False)], chatml)
    with pytest.raises(UserError, match="their manifests differ in reference_logprobs"):
        merge_streams(tmp_path / "mixed", [tmp_path / "whole", tmp_path / "free"])


def weighted(pairs, weights):
    return [dataclasses.replace(pair, pair_weight=weight) for pair, weight in zip(pairs, weights)]


def test_weights_follow_their_pairs(chatml, tokenizer_folders, tmp_path):
    """Where some pairs have a weight, the others count as 1: written, merged, split and blended."""
    given = [None] * 25 + [0.0, 2.5, None, 0.125] + [None] * 11
    pairs, expected = weighted(MANY, given), [1.0 if weight is None else weight for weight in given]
    write_streams(tmp_path / "whole", pairs, chatml)
    whole = verify(tmp_path / "whole")
    assert [whole[i].pair_weight for i in range(40)] == whole.pair_weights.tolist() == expected
    assert whole.manifest["pair_weights"] == {"least": 0.0, "greatest": 2.5}
    for name, part in (("a", pairs[:20]), ("b", pairs[20:])):
        write_streams(tmp_path / name, part, chatml)
        write_shard(tmp_path / "labelled" / f"{name}.parquet", part, weighted=name == "b")
    assert open_streams(tmp_path / "a").pair_weights is None
    merge_streams(tmp_path / "merged", [tmp_path / "a", tmp_path / "b"])
    for name, workers in (("one", 1), ("several", 3)):
        index(
            IndexSection(str(tmp_path / "labelled"), str(tmp_path / name), str(tokenizer_folders["chatml"]), workers, 0)
        )
    for name in ("merged", "one", "several"):
        assert bytes_of(tmp_path / name) == bytes_of(tmp_path / "whole"), name
    blend = open_streams(f"{tmp_path}/a {tmp_path}/b")
    assert [blend[i].pair_weight for i in range(40)] == blend.pair_weights.tolist() == expected
    assert blend.manifest["pair_weights"] == whole.manifest["pair_weights"]
    split_streams(whole, (tmp_path / "x", tmp_path / "y"), 0.5)
    by_id = dict(zip((pair.pair_id for pair in pairs), expected))
    for side in (open_streams(tmp_path / "x"), open_streams(tmp_path / "y")):
        assert side.pair_weights.tolist() == [by_id[side.pair_id(i)] for i in range(len(side))]
    batch = collate([whole[26], whole[0]], "packed", weighted=True)
    assert batch["pair_weights"].tolist() == [2.5, 1.0] and "pair_weights" not in collate([whole[26]], "packed")
    (tmp_path / ".whole_pair_weights.bin.partial").write_text("left by a killed process")
    write_streams(tmp_path / "whole", MANY, chatml)
    assert verify(tmp_path / "whole")[0].pair_weight is None
    assert not any(path.exists() for path in stream_paths(tmp_path / "whole", "pair_weights"))


def named(pairs, *names):
    """The pairs with further token rewards: those of the pair times 1, 1/2, 1/4, ..."""
    return [
        dataclasses.replace(
            pair,
            **{
                f"{side}_values": {name: getattr(pair, f"{side}_token_rewards") / 2**i for i, name in enumerate(names)}
                for side in ("chosen", "rejected")
            },
        )
        for pair in pairs
    ]


def test_named_token_rewards_are_chosen_on_opening(chatml, tmp_path):
    pairs = named(MANY, "x", "b2")
    write_streams(tmp_path / "plain", MANY, chatml)
    manifest = write_streams(tmp_path / "t", pairs, chatml)
    assert manifest["values"] == ["b2", "x"]
    for name in ("tokens", "token_rewards", "ref_logprobs", "pair_ids"):
        assert (
            stream_paths(tmp_path / "t", name)[0].read_bytes() == stream_paths(tmp_path / "plain", name)[0].read_bytes()
        )
    for values, factor in ((None, 1), ("", 1), ("x", 1), ("b2", 0.5)):
        record = pickle.loads(pickle.dumps(open_streams(tmp_path / "t", values)))[7]
        np.testing.assert_array_equal(record.rejected_token_rewards, MANY[7].rejected_token_rewards * factor)
        assert_holds(
            record._replace(chosen_token_rewards=None, rejected_token_rewards=None),
            dataclasses.replace(MANY[7], chosen_token_rewards=None, rejected_token_rewards=None),
        )
    with pytest.raises(UserError, match="no token rewards named c, only b2, x: set objective.values"):
        open_streams(tmp_path / "t", "c")
    with pytest.raises(UserError, match="no token rewards named x, only the main ones"):
        open_streams(tmp_path / "plain", "x")
    batch = collate([open_streams(tmp_path / "t", "b2")[7]], "packed")
    rewards = np.concatenate([MANY[7].chosen_token_rewards, MANY[7].rejected_token_rewards]) / 2
    assert batch["token_rewards"].tolist() == rewards.tolist()


def test_named_token_rewards_are_merged_split_and_blended(chatml, tokenizer_folders, tmp_path):
    pairs = named(MANY, "x", "b2")
    write_streams(tmp_path / "whole", pairs, chatml)
    for name, part in (("a", pairs[:25]), ("b", pairs[25:])):
        write_streams(tmp_path / name, part, chatml)
        write_shard(tmp_path / "labelled" / f"{name}.parquet", part)
    merge_streams(tmp_path / "merged", [tmp_path / "a", tmp_path / "b"])
    index(IndexSection(str(tmp_path / "labelled"), str(tmp_path / "several"), str(tokenizer_folders["chatml"]), 3, 0))
    assert bytes_of(tmp_path / "merged") == bytes_of(tmp_path / "several") == bytes_of(tmp_path / "whole")
    split_streams(open_streams(tmp_path / "whole"), (tmp_path / "p", tmp_path / "q"), 0.5)
    by_id = {pair.pair_id: pair for pair in pairs}
    for side in (open_streams(tmp_path / "p", "b2"), open_streams(f"{tmp_path}/a {tmp_path}/b", "b2")):
        for i in range(len(side)):
            np.testing.assert_array_equal(side[i].chosen_token_rewards, by_id[side.pair_id(i)].chosen_values["b2"])
    write_streams(tmp_path / "b", named(MANY[25:], "x"), chatml)
    assert not stream_paths(tmp_path / "b", "token_rewards_b2")[0].exists()
    assert open_streams(f"{tmp_path}/a {tmp_path}/b").manifest["values"] == ["x"]
    with pytest.raises(UserError, match="cannot be merged: their manifests differ in values"):
        merge_streams(tmp_path / "no", [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(UserError, match="pair p1 has token rewards named none, the pairs before it b2, x"):
        write_streams(tmp_path / "no", [pairs[0], MANY[1]], chatml)


def prompt_of(pair):
    return pair.chosen_tokens[: len(pair.chosen_tokens) - len(pair.chosen_token_rewards)]


def test_no_prompt_is_on_both_sides_of_a_split(chatml, tmp_path):
    """Five pairs for each of forty prompts."""
    write_streams(tmp_path / "all", [pair(f"p{n}", 3 + n % 40, 4, 5) for n in range(200)], chatml)
    split_streams(open_streams(tmp_path / "all"), (tmp_path / "a", tmp_path / "b"), 0.3)
    sides = [open_streams(tmp_path / name) for name in "ab"]
    prompts = [{tuple(prompt_of(side[i]).tolist()) for i in range(len(side))} for side in sides]
    assert all(prompts) and not prompts[0] & prompts[1]
    assert sum(map(len, sides)) == 200


def test_splitting_by_hash_loses_nothing_and_keeps_pairs_on_their_side(chatml, tokenizer_folders, tmp_path):
    write_shard(tmp_path / "own.parquet", MANY)
    index(
        IndexSection(
            str(tmp_path / "own.parquet"),
            str(tmp_path / "t"),
            str(tokenizer_folders["chatml"]),
            workers=1,
            validation_fraction=0.25,
        )
    )
    sides = [verify(tmp_path / "t"), verify(tmp_path / "t_validation")]
    ids = [[side.pair_id(i) for i in range(len(side))] for side in sides]
    assert sorted(ids[0] + ids[1]) == sorted(p.pair_id for p in MANY)
    assert [i for i, p in enumerate(MANY) if in_validation(prompt_of(p), 0.25)] == [int(name[1:]) for name in ids[1]]
    by_name = {p.pair_id: p for p in MANY}
    for side in sides:
        for i in range(len(side)):
            assert_holds(side[i], by_name[side.pair_id(i)])
    with pytest.raises(UserError, match="leaves none for"):
        split_streams(sides[1], (tmp_path / "x", tmp_path / "y"), 1e-9)


def test_every_byte_of_every_part_is_compared(chatml, tmp_path):
    """A flipped bit far from the ends of a file, which opening does not read."""
    for name in ("a", "b"):
        write_streams(tmp_path / name, [pair(f"{name}{i}", 5, 30, 30) for i in range(1200)], chatml)
    path = stream_paths(tmp_path / "b", "token_rewards")[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    open_streams(tmp_path / "a").require_unchanged()
    for prefix in (tmp_path / "b", f"{tmp_path}/a {tmp_path}/b"):
        with pytest.raises(UserError, match="b_token_rewards.bin has changed since it was written"):
            open_streams(prefix).require_unchanged()


def test_blends_leave_no_pair_out_and_keep_the_shares(chatml, tmp_path):
    write_streams(tmp_path / "a", MANY[:10], chatml)
    write_streams(tmp_path / "b", MANY[10:], chatml)
    blend = open_streams(f"0.5 {tmp_path}/a 0.5 {tmp_path}/b")
    ids = [blend[i].pair_id for i in range(len(blend))]
    assert len(ids) == 60 and set(ids) == {p.pair_id for p in MANY} and ids.count("p0") == 3 and ids.count("p39") == 1
    assert blend.sequence_lengths.tolist() == [
        [len(blend[i].chosen_tokens), len(blend[i].rejected_tokens)] for i in range(60)
    ]
    (tmp_path / "recipe.yaml").write_text(
        f"data:\n  train: >-\n    0.5 {tmp_path}/a\n    0.5 {tmp_path}/b\nmodel: {{hf: x}}\n"
    )
    written = load_recipe(tmp_path / "recipe.yaml").data.train
    assert [open_streams(written)[i].pair_id for i in range(60)] == ids
    together = open_streams(f"{tmp_path}/a {tmp_path}/b")
    assert [together.pair_id(i) for i in range(40)] == [p.pair_id for p in MANY]
    for written, message in (
        (f"0.5 {tmp_path}/a {tmp_path}/b", "is not a blend"),
        (f"-1 {tmp_path}/a", "positive"),
        (f"1e-9 {tmp_path}/a 1 {tmp_path}/b", "give the larger datasets more weight"),
    ):
        with pytest.raises(UserError, match=message):
            open_streams(written)
