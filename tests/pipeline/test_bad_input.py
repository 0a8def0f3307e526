"""Bad input to each step: one line that says what, where and what to do; exit code 2; no partial output."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.pipeline.conftest import PAIRS, assert_refused, run_command
from tests.support.labelled import pair
from tests.support.tiny import tiny_tokenizer
from treg_megatron.checkpoint.from_hf import import_checkpoint
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.data.streams import open_streams, write_streams
from treg_megatron.labelling.indexing import index
from treg_megatron.labelling.job import label
from treg_megatron.tokenizer.chat import load_tokenizer

TINY = ["--recipe", "recipes/tiny.yaml"]


@pytest.fixture(scope="module")
def files(tiny_hf, tmp_path_factory) -> Path:
    """A folder with everything that training needs: pairs, labels, streams, checkpoint."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    recipe = load_recipe(
        "recipes/tiny.yaml", [f"run={folder}", f"model.hf={tiny_hf}", f"label.pairs={folder}/pairs.jsonl"]
    )
    label(section(recipe, "label"))
    index(section(recipe, "index"))
    import_checkpoint(tiny_hf, folder / "megatron")
    return folder


def train(files: Path, tiny_hf: Path, *overrides: str):
    return run_command(
        "-m",
        "treg_megatron.train",
        *TINY,
        f"run={files}",
        f"model.hf={tiny_hf}",
        f"train.output={files}/refused",
        *overrides,
    )


@pytest.mark.parametrize(
    "content, pattern",
    [
        (None, "pairs.jsonl.*(does not exist|No such file)"),
        ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": \n', "pairs.jsonl.*row 2"),
        ('{"prompt": "a", "chosen": "", "rejected": "c"}\n', "pairs.jsonl.*row 1.*empty"),
        (json.dumps({"prompt": "paris " * 600, "chosen": "b", "rejected": "c"}) + "\n", "no pair"),
    ],
    ids=["missing file", "row that does not parse", "empty response", "prompt that fills the context"],
)
def test_label_refuses(content, pattern, tiny_hf, tmp_path):
    if content is not None:
        (tmp_path / "pairs.jsonl").write_text(content)
    result = run_command(
        "tools/label_tokens.py",
        *TINY,
        "--model",
        tiny_hf,
        "--pairs",
        tmp_path / "pairs.jsonl",
        "--output",
        tmp_path / "labelled",
    )
    assert_refused(result, pattern)
    assert not list(tmp_path.glob("labelled/*.parquet")) and not (tmp_path / "labelled" / "manifest.json").exists()


def test_index_refuses_another_tokenizer(files, tmp_path):
    tiny_tokenizer(tmp_path / "other", template="headers")
    result = run_command(
        "tools/index_pairs.py",
        *TINY,
        f"run={files}",
        "--tokenizer",
        tmp_path / "other",
        "--output",
        tmp_path / "streams",
    )
    assert_refused(result, "another tokenizer")
    assert not list(tmp_path.glob("streams*"))


@pytest.mark.parametrize(
    "override, pattern",
    [
        ("parallel.tensor=3", "parallel.tensor=3 .*needs a multiple of 3 processes"),
        ("data.global_batch_size=64", "12 pairs, fewer than data.global_batch_size=64"),
        ("data.sequence_length=3", "unknown recipe key data.sequence_length; did you mean data.seq_length"),
        ("objective.alpha=3", "objective.alpha is 3"),
        ("data.seq_length=8", "longer than data.seq_length=8.*label.max_length"),
        ("data.micro_batch_size=3", "not a multiple of data.micro_batch_size=3"),
        ("train.precision=fp8", "train.precision is 'fp8'; choose one of"),
        ("data.train=nowhere", "nowhere"),
        ("model.checkpoint=nowhere", "nowhere does not exist"),
    ],
)
def test_train_refuses(override, pattern, files, tiny_hf):
    assert_refused(train(files, tiny_hf, override), pattern)
    assert not (files / "refused").exists()


def test_train_refuses_a_tensor_size_that_does_not_divide_the_heads(files, tiny_hf):
    result = run_command(
        "-m", "treg_megatron.train", *TINY, f"run={files}", f"model.hf={tiny_hf}", "parallel.tensor=3", ranks=3
    )
    assert (
        result.returncode != 0
        and result.stderr.count(
            "error: parallel.tensor=3 does not divide the model's 4 attention heads; tensor sizes that do: 1, 2"
        )
        == 1
    )


def test_train_refuses_streams_of_another_tokenizer(files, tmp_path):
    tiny_tokenizer(tmp_path, template="headers")
    assert_refused(train(files, tmp_path), "another tokenizer")


def test_train_refuses_an_index_whose_offsets_do_not_follow_from_its_lengths(files, tiny_hf, tmp_path):
    """One token more in the first sequence and one less in the second: the file keeps the size in the manifest."""
    streams = tmp_path / "streams"
    shutil.copytree(files / "streams", streams)
    path = streams / "train_token_rewards.idx"
    content = bytearray(path.read_bytes())
    lengths = np.frombuffer(content, dtype=np.int32, count=2 * len(PAIRS), offset=34).copy()
    lengths[:2] += [1, -1]
    content[34 : 34 + lengths.nbytes] = lengths.tobytes()
    path.write_bytes(bytes(content))
    assert_refused(
        train(files, tiny_hf, f"data.train={streams}/train"),
        "train_token_rewards.idx: offsets do not follow from lengths",
    )
    assert not (files / "refused").exists()


def test_train_refuses_a_flipped_bit_far_from_the_ends_of_a_file(files, tiny_hf, tmp_path):
    prefix = tmp_path / "train"
    write_streams(prefix, [pair(f"p{i}", 5, 30, 30) for i in range(1200)], load_tokenizer(tiny_hf))
    path = tmp_path / "train_token_rewards.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    open_streams(prefix)
    assert_refused(
        train(files, tiny_hf, f"data.train={prefix}"), "train_token_rewards.bin has changed since it was written"
    )
    assert not (files / "refused").exists()
