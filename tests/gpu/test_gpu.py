"""One GPU gives the same results as the CPU in fp32: training losses, log-probs of the head, token rewards."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.pipeline.conftest import PAIRS, ROOT

STEPS = 6


def run(*arguments: object, cuda: bool) -> None:
    hidden = {} if cuda else {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | hidden,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def prepared(tiny_hf, tmp_path_factory) -> list[str]:
    """Label on the CPU, index and import; returns the overrides of a recipe that trains on the result."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    common = [
        "--recipe",
        "recipes/tiny.yaml",
        f"run={folder}",
        f"model.hf={tiny_hf}",
        f"label.pairs={folder}/pairs.jsonl",
    ]
    run("tools/label_tokens.py", *common, cuda=False)
    run("tools/index_pairs.py", *common, cuda=False)
    run("tools/convert_checkpoint.py", "import", *common, cuda=False)
    return common


def losses(prepared: list[str], output: Path, *overrides: str, cuda: bool) -> np.ndarray:
    run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=1",
        "-m",
        "treg_megatron.train",
        *prepared,
        f"train.output={output}",
        "data.epochs=10",
        f"train.max_steps={STEPS}",
        *overrides,
        cuda=cuda,
    )
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return np.array([line["loss"] for line in lines if "loss" in line])


@pytest.fixture(scope="module")
def on_cpu(prepared, tmp_path_factory) -> np.ndarray:
    return losses(prepared, tmp_path_factory.mktemp("cpu") / "out", cuda=False)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 1e-2)])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_training_losses_equal_those_of_the_cpu(precision, tolerance, layout, prepared, on_cpu, tmp_path):
    found = losses(
        prepared,
        tmp_path / "out",
        f"train.precision={precision}",
        f"data.layout={layout}",
        "train.first_loss_tolerance=0.02",
        cuda=True,
    )
    assert len(found) == STEPS
    np.testing.assert_allclose(found, on_cpu, rtol=tolerance)


def test_token_rewards_equal_those_of_the_cpu(prepared, tmp_path):
    from treg_megatron.data.labelled_pairs import read_labelled

    run("tools/label_tokens.py", *prepared, f"label.output={tmp_path}/gpu", "label.dtype=float32", cuda=True)
    folder = next(o for o in prepared if o.startswith("run=")).removeprefix("run=")
    for ours, theirs in zip(
        read_labelled(tmp_path / "gpu"), read_labelled(Path(folder) / "labelled" / "train"), strict=True
    ):
        assert ours.pair_id == theirs.pair_id
        np.testing.assert_allclose(ours.chosen_token_rewards, theirs.chosen_token_rewards, atol=1e-4)
        np.testing.assert_allclose(ours.rejected_ref_logprobs, theirs.rejected_ref_logprobs, atol=1e-3)


def test_the_head_equals_float64_on_the_cpu():
    from treg_megatron.models.head import response_logps

    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(300, 64, generator=generator), torch.randn(5000, 64, generator=generator)
    targets, upstream = torch.randint(0, 5000, (300,), generator=generator), torch.randn(300, generator=generator)
    results = []
    for x, w, where in ((hidden.double(), weight.double(), "cpu"), (hidden, weight, "cuda")):
        x, w = (t.detach().to(where).requires_grad_() for t in (x, w))
        if where == "cpu":
            logps = (x @ w.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        else:
            logps = response_logps(x, w, targets.cuda(), 5000, block_vocab=700)
        logps.backward(upstream.to(where).to(logps.dtype))
        results.append([t.detach().cpu().double() for t in (logps, x.grad, w.grad)])
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
