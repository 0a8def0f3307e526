"""All steps as commands: import, label, index, train on two pipeline ranks (killed and resumed), export."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.pipeline.conftest import PAIRS, ROOT, run_command
from tests.support import reference
from treg_megatron.data.streams import open_streams


def ok(*arguments, **options) -> str:
    result = run_command(*arguments, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def run(tiny_hf, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    common = ["--recipe", "recipes/tiny.yaml", f"run={folder}", f"model.hf={tiny_hf}"]
    ok("tools/convert_checkpoint.py", "import", *common)
    ok("tools/label_tokens.py", *common, "--pairs", folder / "pairs.jsonl")
    ok("tools/index_pairs.py", *common)
    return folder


def train_command(run: Path, tiny_hf: Path, output: Path) -> list:
    return [
        "-m",
        "treg_megatron.train",
        "--recipe",
        "recipes/tiny.yaml",
        f"run={run}",
        f"model.hf={tiny_hf}",
        "parallel.pipeline=2",
        "data.epochs=4",
        "train.save_every=4",
        f"train.output={output}",
    ]


@pytest.fixture(scope="module")
def trained(run, tiny_hf) -> Path:
    ok(*train_command(run, tiny_hf, run / "train"), ranks=2)
    return run / "train"


def losses(output: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in map(json.loads, (output / "metrics.jsonl").read_text().splitlines())}


def test_a_run_writes_metrics_checkpoints_and_its_recipe(trained):
    found = losses(trained)
    assert list(found) == list(range(1, 13))
    first = json.loads((trained / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss/preference"] == pytest.approx(0.693147, abs=1e-4)
    assert {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "treg/weight",
        "treg/token_reward_chosen",
        "loss/regularization",
        "grad_norm",
        "lr",
    } <= set(first)
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == ["step_000008", "step_000012"]
    assert list((trained / "tensorboard").iterdir()) and (trained / "recipe.yaml").exists()


def test_a_run_resumes_after_sigkill_of_all_processes(run, tiny_hf, trained):
    output = run / "killed"
    job = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            *map(str, train_command(run, tiny_hf, output)),
        ],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    deadline = time.time() + 200
    while '"step": 6,' not in (output / "metrics.jsonl").read_text() if (output / "metrics.jsonl").exists() else True:
        assert time.time() < deadline and job.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    everything = descendants(job.pid)
    for pid in everything:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it ended with its parent
            if b"spawn_main" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
    job.wait()
    while left := [pid for pid in everything if Path(f"/proc/{pid}").exists()]:
        assert time.time() < deadline, f"{left} outlive the ranks that started them"
        time.sleep(0.1)
    assert max(losses(output)) < 12
    assert "resuming from step_000004" in ok(*train_command(run, tiny_hf, output), ranks=2)
    assert losses(output) == losses(trained)


def descendants(pid: int) -> list[int]:
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [pid] + [p for child in children for p in descendants(int(child))]


def test_exported_model_has_the_final_log_probs_of_training(run, tiny_hf, trained):
    """Megatron's log-probs in the last validation equal those of the exported folder in transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    command = train_command(run, tiny_hf, run / "validated")
    ok(*command, f"data.validation={run}/streams/train", ranks=2)
    last = [
        r
        for r in map(json.loads, (run / "validated" / "metrics.jsonl").read_text().splitlines())
        if "validation/logps/chosen" in r
    ][-1]
    assert last["step"] == 12
    ok(
        "tools/convert_checkpoint.py",
        "export",
        "--recipe",
        "recipes/tiny.yaml",
        f"run={run}",
        f"model.hf={tiny_hf}",
        f"train.output={run}/validated",
    )
    model, info = AutoModelForCausalLM.from_pretrained(run / "hf", output_loading_info=True)
    assert not any(info.values())
    AutoTokenizer.from_pretrained(run / "hf")
    streams = open_streams(run / "streams" / "train")
    for side in ("chosen", "rejected"):
        with torch.no_grad():
            sums = [
                reference.response_logps(model, getattr(pair, f"{side}_tokens"), getattr(pair, f"{side}_token_rewards"))
                .sum()
                .item()
                for pair in (streams[i] for i in range(len(streams)))
            ]
        tokens = streams.response_lengths[:, 0 if side == "chosen" else 1].sum() / len(streams)
        assert abs(sum(sums) / len(sums) - last[f"validation/logps/{side}"]) / tokens < 1e-4
    card = (run / "hf" / "README.md").read_text()
    for expected in (
        "base_model: ",
        "after DPO with [T-REG]",
        "## Metrics of step 12",
        f"pairs: {len(streams)}",
        streams.manifest["files"]["tokens.bin"]["sha256"],
        "global_batch_size: ",
    ):
        assert expected in card
    greedy = [5, 6]
    while len(greedy) < 5 and greedy[-1] != model.config.eos_token_id:
        greedy.append(model(torch.tensor([greedy])).logits[0, -1].argmax().item())
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).tolist() == [greedy]


def test_preference_accuracy_is_what_the_last_validation_measured(run, tiny_hf, trained):
    """On the same pairs, by two processes: from the labels, and from the pairs with the reference scored anew."""
    command = train_command(run, tiny_hf, run / "measured")
    ok(*command, f"data.validation={run}/streams/train", ranks=2)
    records = map(json.loads, (run / "measured" / "metrics.jsonl").read_text().splitlines())
    last = [record for record in records if "validation/loss" in record][-1]
    exported = run / "measured" / "hf"
    common = ["--recipe", "recipes/tiny.yaml", f"run={run}", f"model.hf={tiny_hf}"]
    export = [f"train.output={run}/measured", f"export.output={exported}"]
    ok("tools/convert_checkpoint.py", "export", *common, *export)
    for name, pairs in (("labels", run / "labelled" / "train"), ("pairs", run / "pairs.jsonl")):
        output = run / "accuracy" / name
        given = ["--model", exported, "--pairs", pairs, "--output", output, "--shard-pairs", "2"]
        assert "wrote " in ok("tools/preference_accuracy.py", *common, *given, ranks=2)
        figures = json.loads((output / "accuracy.json").read_text())["subsets"]["all"]
        assert figures["pairs"] == len(PAIRS)
        assert figures["implicit_reward_accuracy"] == last["validation/rewards/accuracies"]
        assert figures["implicit_reward_margin"] == pytest.approx(last["validation/rewards/margins"], abs=1e-4)
        logps = [last[f"validation/logps/{side}"] for side in ("chosen", "rejected")]
        assert figures["log_prob_margin"] == pytest.approx(logps[0] - logps[1], abs=1e-3)


def test_show_prints_the_trained_policy_next_to_the_labels(run, tiny_hf, trained):
    """The trained run is scored by Megatron; the untrained model, with implicit rewards 0, by Hugging Face."""
    show = ["tools/show_rewards.py", "--labelled", run / "labelled" / "train", "--tokenizer", tiny_hf, "--text"]
    line = re.compile(r"^mean implicit reward of the policy, (\w+) +(\S+)$", re.MULTILINE)
    after, before = (dict(line.findall(ok(*show, "--policy", policy))) for policy in (trained, tiny_hf))
    assert float(after["chosen"]) > float(after["rejected"])
    assert {abs(float(mean)) for mean in before.values()} == {0.0}
