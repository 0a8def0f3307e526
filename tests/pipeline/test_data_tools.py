"""Commands that turn a user's own token rewards into streams, and all commands of tools/streams.py."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.pipeline.conftest import PAIRS, assert_refused, run_command
from treg_megatron.data.aligned import stream_paths
from treg_megatron.data.streams import open_streams

REWARDED = [
    {
        **pair,
        "chosen_spans": [[0, len(pair["chosen"]), 0.25]],
        "rejected_token_texts": [pair["rejected"]],
        "rejected_token_rewards": [-0.25],
    }
    for pair in PAIRS
]


def ok(*arguments) -> str:
    result = run_command(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tiny_hf, tmp_path_factory) -> Path:
    """Two halves of the pairs, each imported with reference log-probs and indexed."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("a", REWARDED[:5]), ("b", REWARDED[5:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        printed = ok(
            "tools/import_rewards.py",
            "--recipe",
            "recipes/tiny.yaml",
            "--model",
            tiny_hf,
            "--pairs",
            folder / f"{name}.jsonl",
            "--output",
            folder / name,
            "--shard-pairs",
            "3",
        )
        assert printed == f"imported {len(rows)} pairs to {folder / name}.parquet (dropped: none)\n"
        ok(
            "tools/index_pairs.py",
            "--tokenizer",
            tiny_hf,
            "--labelled",
            folder / f"{name}.parquet",
            "--output",
            folder / name,
        )
    return folder


def test_imported_rewards_have_the_reference_log_probs_of_the_model(folder, tiny_hf):
    import torch
    from transformers import AutoModelForCausalLM

    from tests.support import reference

    model, streams = AutoModelForCausalLM.from_pretrained(tiny_hf), open_streams(folder / "b")
    for i in range(len(streams)):
        pair = streams[i]
        with torch.no_grad():
            logps = reference.response_logps(model, pair.chosen_tokens, pair.chosen_token_rewards)
        np.testing.assert_allclose(pair.chosen_ref_logprobs, logps, atol=1e-4)
        assert set(pair.chosen_token_rewards[:-1]) == {np.float32(0.25)} and pair.chosen_token_rewards[-1] == 0


def test_text_goes_straight_to_streams_without_a_reference(folder, tiny_hf):
    ok(
        "tools/index_pairs.py",
        "--tokenizer",
        tiny_hf,
        "--labelled",
        folder / "a.jsonl",
        "--output",
        folder / "text",
        "--workers",
        "2",
    )
    text, imported = open_streams(folder / "text"), open_streams(folder / "a")
    for i in range(len(imported)):
        for name, value in text[i]._asdict().items():
            np.testing.assert_array_equal(value, None if "ref_logprobs" in name else getattr(imported[i], name))


def test_merge_split_info_verify(folder):
    assert (
        ok("tools/streams.py", "merge", folder / "merged", folder / "b", folder / "a")
        == f"merged 2 streams to {folder / 'merged'}: 12 pairs\n"
    )
    merged = open_streams(folder / "merged")
    assert [merged.pair_id(i) for i in range(12)] == [pair["pair_id"] for pair in PAIRS[5:] + PAIRS[:5]]
    ok(
        "tools/streams.py",
        "split",
        folder / "merged",
        "--train",
        folder / "train",
        "--validation",
        folder / "held-out",
        "--fraction",
        "0.3",
    )
    sides = [open_streams(folder / name) for name in ("train", "held-out")]
    assert sorted(side.pair_id(i) for side in sides for i in range(len(side))) == sorted(p["pair_id"] for p in PAIRS)
    printed = json.loads(ok("tools/streams.py", "info", folder / "merged"))
    assert printed["pairs"] == 12 and printed["reference_logprobs"] is True and "files" not in printed
    assert ok("tools/streams.py", "verify", folder / "a", folder / "merged").splitlines() == [
        f"{folder / 'a'}: 5 pairs, every byte as it was written",
        f"{folder / 'merged'}: 12 pairs, every byte as it was written",
    ]


def test_impossible_requests_are_refused(folder, tiny_hf, tmp_path):
    assert_refused(
        run_command("tools/streams.py", "merge", folder / "twice", folder / "a", folder / "a"),
        "pair_id 'p0' of .*a is also in an earlier part",
    )
    assert_refused(run_command("tools/streams.py", "info", folder / "absent"), "absent.manifest.json does not exist")
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    assert_refused(
        run_command(
            "tools/import_rewards.py",
            "--model",
            tiny_hf,
            "--pairs",
            tmp_path / "plain.jsonl",
            "--output",
            tmp_path / "out",
            "--no-reference",
        ),
        "plain.jsonl, pair p0: chosen has no token rewards",
    )
    assert not list(folder.glob("twice*")) and not list(tmp_path.glob("out*"))
    path = stream_paths(folder / "b", "token_rewards")[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert_refused(
        run_command("tools/streams.py", "verify", folder / "b"), "b_token_rewards.bin has changed since it was"
    )


def test_inspect_reports_on_a_file(folder):
    printed = ok("tools/inspect_pairs.py", folder / "a.jsonl")
    assert printed.startswith("5 pairs, read as trl\n") and "characters of prompt: minimum" in printed
    assert json.loads(ok("tools/inspect_pairs.py", folder / "a.jsonl", "--json"))["pairs"] == 5


def test_label_reports_without_labelling(folder, tiny_hf, tmp_path):
    printed = ok(
        "tools/label_tokens.py",
        "--pairs",
        folder / "a.jsonl",
        "--model",
        tiny_hf,
        "--max-length",
        "20",
        "--output",
        tmp_path / "labelled",
        "--report",
    )
    assert printed.startswith("5 pairs, read as trl\n") and "tokens of prompt: minimum" in printed
    assert "longer than the maximum length: " in printed and not list(tmp_path.iterdir())
