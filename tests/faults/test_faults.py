"""A thousand ways to damage files: each is refused with one line that names the file, or read correctly."""

import itertools
import json
import os
import random
import resource
import shutil
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.support.labelled import THREE, pair
from treg_megatron.data.aligned import stream_paths
from treg_megatron.data.labelled_pairs import LabelledPair, read_labelled, write_shard
from treg_megatron.data.pairs import read_pairs
from treg_megatron.data.records import read_rows
from treg_megatron.data.streams import merge_streams, open_streams, split_streams, verify, write_streams
from treg_megatron.errors import UserError

SEEDS = range(250)  # for each of four kinds of file
FOLDER = Path(__file__).resolve().parents[1] / "data" / "pairs"
PAIR_FILES = sorted(path for path in FOLDER.rglob("*") if path.is_file())


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content after truncation, or with some bytes flipped, overwritten, duplicated or moved."""
    at, length = chance.randrange(len(content)), chance.choice((1, 1, 4, 20))
    kind = chance.choice(("cut", "flip", "zero", "invalid", "double", "swap"))
    if kind == "cut":
        return content[:at]
    if kind == "flip":
        return (
            content[:at]
            + bytes(byte ^ (1 << chance.randrange(8)) for byte in content[at : at + length])
            + content[at + length :]
        )
    if kind == "zero":
        return content[:at] + bytes(len(content[at : at + length])) + content[at + length :]
    if kind == "invalid":
        return content[:at] + b"\xff" + content[at + 1 :]  # never occurs in UTF-8
    if kind == "double":
        return content[:at] + content[at : at + length] + content[at:]
    return content[at:] + content[:at]


def refused_or_read(read, *names: str) -> bool:
    """Whether ``read`` succeeded; otherwise its error must name one of the files."""
    try:
        read()
        return True
    except UserError as error:
        assert any(name in str(error) for name in names), error
        return False


def test_pairs(tmp_path):
    outcomes = []
    for seed in SEEDS:
        chance = random.Random(seed)
        source = chance.choice(PAIR_FILES)
        path = tmp_path / source.name
        if source.parent != FOLDER:  # a file in a folder written by datasets
            path = tmp_path / source.parent.name
            shutil.copytree(source.parent, path, dirs_exist_ok=True)
        (path / source.name if path.is_dir() else path).write_bytes(damaged(source.read_bytes(), chance))
        read: list[bytes] = []

        def read_all(read=read, path=path):
            read.extend(pair.chosen.encode() for pair in read_pairs(path))

        outcomes.append(refused_or_read(read_all, path.name))
        if outcomes[-1] and source.suffix in (".parquet", ".arrow"):  # these formats store their number of rows
            assert len(read) == 6, seed
    assert 0 < sum(outcomes) < len(SEEDS)  # a text with flipped letters is still valid


def test_rows_are_not_lost_silently(tmp_path):
    """Damage that readers treat as an end or ignore: an Arrow stream cut between two batches, zeros instead of the
    length of the second one, a Parquet page of a type that is skipped."""
    batch = pa.record_batch({name: ["x", "y"] for name in ("prompt", "chosen")} | {"rejected": ["no", "no"]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
        first = sink.tell()
        stream.write_batch(batch)
    arrow = sink.getvalue().to_pybytes()
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    for content, rows in (
        (arrow, 4),
        (arrow[:first], None),
        (arrow[: first + 4] + bytes(4) + arrow[first + 8 :], None),
    ):
        (tmp_path / "data.arrow").write_bytes(content)
        if rows:
            assert len(list(read_rows(tmp_path))) == rows
        else:
            with pytest.raises(UserError, match="data.arrow .*after row 2: the stream ends at byte"):
                list(read_rows(tmp_path))
    good, path = (FOLDER / "ultrafeedback.parquet").read_bytes(), tmp_path / "own.parquet"
    for at, bit in itertools.product(range(4, 24), range(8)):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
        read: list = []
        if refused_or_read(lambda to=read: to.extend(read_rows(path)), "own.parquet"):
            assert len(read) == 6, (at, bit)


def test_labelled_pairs(tmp_path):
    """Files are refused or read as written: the pages of our own files have checksums."""
    write_shard(tmp_path / "good.parquet", THREE)
    good, path = (tmp_path / "good.parquet").read_bytes(), tmp_path / "own.parquet"
    for seed in SEEDS:
        path.write_bytes(damaged(good, random.Random(seed)))
        read: list[LabelledPair] = []
        if refused_or_read(lambda to=read: to.extend(read_labelled(path)), "own.parquet"):
            assert list(map(trained_on, read)) == list(map(trained_on, THREE)), seed


def trained_on(pair: LabelledPair) -> list:
    """The fields of a pair that training uses."""
    return [
        pair.pair_id,
        *(
            getattr(pair, f"{side}_{name}").tolist()
            for side in ("chosen", "rejected")
            for name in ("tokens", "token_rewards", "ref_logprobs")
        ),
    ]


def test_streams_are_read_as_written_or_refused(chatml, tmp_path):
    """verify() detects every change to a file of the streams; open_streams() never crashes."""
    write_streams(tmp_path / "good", THREE, chatml)
    files = {path.name.replace("good", "t"): path.read_bytes() for path in tmp_path.glob("good*")}
    prefix = tmp_path / "t"
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for seed in SEEDS:
        chance = random.Random(seed)
        name = chance.choice(sorted(set(files) - {"t.manifest.json"}))
        changed = damaged(files[name], chance)
        (tmp_path / name).write_bytes(changed)
        assert refused_or_read(lambda: verify(prefix), "t_") == (changed == files[name])
        refused_or_read(lambda: [open_streams(prefix)[i] for i in range(3)], "t_", str(prefix))
        (tmp_path / name).write_bytes(files[name])


def test_manifests(chatml, tmp_path):
    """Damaged bytes, and well-formed JSON with missing keys or values of the wrong type."""
    prefix = tmp_path / "t"
    write_streams(prefix, THREE, chatml)
    path = tmp_path / "t.manifest.json"
    good = path.read_bytes()
    for seed in SEEDS:
        chance = random.Random(seed)
        if chance.random() < 0.5:
            path.write_bytes(damaged(good, chance))
        else:
            manifest = json.loads(good)
            files = manifest["files"]
            inside = chance.choice([manifest, manifest["tokenizer"], files, files["tokens.bin"]])
            name = chance.choice(sorted(inside))
            if chance.random() < 0.5:
                del inside[name]
            else:
                inside[name] = chance.choice([None, "x", -1, 1.5, [], {}, True, 10**30])
            path.write_text(json.dumps(manifest))
        refused_or_read(lambda: [open_streams(prefix)[i] for i in range(3)], "t.manifest.json", "t_", str(prefix))


def test_a_foreign_manifest_and_swapped_streams(chatml, tmp_path):
    """Streams of two runs with the same sizes: exchanged files are detected without reading every byte."""
    for name, seed in (("a", 1), ("b", 2)):
        write_streams(tmp_path / name, [pair(f"{name}{i}", 3, 4 + i % seed, 5 - i % seed) for i in range(4)], chatml)
    shutil.copy(tmp_path / "a.manifest.json", tmp_path / "b.manifest.json")
    with pytest.raises(UserError, match="b_"):
        open_streams(tmp_path / "b")


def test_rewards_and_log_probs_exchanged(chatml, tmp_path):
    prefix = tmp_path / "t"
    write_streams(prefix, THREE, chatml)
    for first, second in zip(stream_paths(prefix, "token_rewards"), stream_paths(prefix, "ref_logprobs")):
        content = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(content)
    with pytest.raises(UserError, match="t_(token_rewards|ref_logprobs).* has changed since it was written"):
        open_streams(prefix)


def test_rows_of_ten_megabytes(tmp_path):
    long = "word " * 2_000_000
    for broken in (False, True):
        path = tmp_path / "long.json"
        path.write_text('[{"prompt": "q", "chosen": "' + long + ('"' if not broken else "") + ', "rejected": "no"}]')
        assert refused_or_read(lambda of=path: list(read_pairs(of)), "long.json row 1") is not broken


def test_rows_out_of_order(chatml, tmp_path):
    """Documents reordered in the index with consistent lengths and offsets: the hash of the index differs."""
    prefix = tmp_path / "t"
    write_streams(prefix, [pair("a", 3, 4, 5), pair("b", 3, 5, 4)], chatml)
    _, index = stream_paths(prefix, "token_rewards")
    content = bytearray(index.read_bytes())
    lengths = np.frombuffer(content, np.int32, 4, 34).copy()
    content[34:50] = lengths[[2, 3, 0, 1]].tobytes()
    index.write_bytes(content)
    with pytest.raises(UserError, match="t_token_rewards"):
        open_streams(prefix)


@contextmanager
def file_size_limit(size: int):
    """Simulate a full disk. Use it only around the write: pytest's own output may be a longer file."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("write", ["streams", "shard", "merge", "split"])
def test_a_full_disk_is_reported_and_leaves_nothing(chatml, tmp_path, write):
    many = [pair(f"p{i}", 40, 60, 60) for i in range(60)]
    write_streams(tmp_path / "in" / "all", many, chatml)
    out = tmp_path / "out"
    with file_size_limit(4096), pytest.raises(UserError, match="cannot write .*out.*File too large"):
        {
            "streams": lambda: write_streams(out / "t", many, chatml),
            "shard": lambda: write_shard(out / "t.parquet", many),
            "merge": lambda: merge_streams(out / "t", [tmp_path / "in" / "all"]),
            "split": lambda: split_streams(open_streams(tmp_path / "in" / "all"), (out / "a", out / "b"), 0.5),
        }[write]()
    assert not [path for path in out.rglob("*") if path.is_file()]


@contextmanager
def read_only(folder: Path):
    """Make a folder read-only, even for root, which temporarily becomes another user."""
    is_root = os.geteuid() == 0
    os.chmod(folder, 0o555)
    try:
        if is_root:
            os.seteuid(65534)
        yield
    finally:
        if is_root:
            os.seteuid(0)
        os.chmod(folder, 0o755)


@pytest.mark.parametrize("write", ["streams", "shard", "merge", "split"])
def test_a_read_only_folder_is_reported_and_unchanged(chatml, write):
    with tempfile.TemporaryDirectory() as name:  # other users may not enter pytest's own folders
        folder = Path(name)
        write_streams(folder / "part", THREE, chatml)
        opened = open_streams(folder / "part")
        writes = {
            "merge": lambda out: merge_streams(out / "t", [folder / "part"]),
            "streams": lambda out: write_streams(out / "t", THREE, chatml),
            "shard": lambda out: write_shard(out / "t.parquet", THREE),
            "split": lambda out: split_streams(opened, (out / "a", out / "b"), 0.5),
        }[write]
        writes(folder / "writable")  # triggers imports, which the other user may not be able to read
        before = sorted(folder.iterdir())
        with read_only(folder), pytest.raises(UserError, match=f"cannot write {folder}.*Permission denied"):
            writes(folder)
        assert sorted(folder.iterdir()) == before


def test_a_folder_that_is_a_file(chatml, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file"):
        write_streams(tmp_path / "file" / "t", THREE, chatml)
    with pytest.raises(UserError, match="cannot write .*file"):
        write_shard(tmp_path / "file" / "s.parquet", THREE)
