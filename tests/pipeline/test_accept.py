"""`treg accept` on CPU ranks: the command as a user starts it."""

import json
from pathlib import Path

from tests.pipeline.conftest import run_command


def accept(card: Path, *names: str) -> dict[str, dict]:
    """The answers to some checks by name, of a run without failures; that to the inputs is left out."""
    done = run_command("-m", "treg_megatron", "accept", "--cpu", "--output", card, "--only", *names, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((card / "acceptance.json").read_text())
    assert found["finished"] and "0 FAIL" in (card / "acceptance.md").read_text()
    inputs, *others = found["checks"]
    assert (inputs["name"], inputs["status"]) == ("inputs", "PASS")
    return {check["name"]: check for check in others}


def test_on_cpu_ranks(tmp_path):
    expected = {
        "collectives": "PASS",
        "train PP2": "PASS",
        "train TP2+SP overlap": "not run",
        "train offload": "PASS",
        "without TE": "not run",
    }
    found = accept(tmp_path / "card", *expected)
    assert {name: check["status"] for name, check in found.items()} == expected


def test_what_is_measured_on_gpus_takes_the_same_path_on_cpu_ranks(tmp_path):
    found = accept(tmp_path / "card", "host syncs", "memory", "speed overlapped")
    assert [check["status"] for check in found.values()] == ["PASS", "not run", "not run"]
    assert found["host syncs"]["figures"][0] == ["host_syncs", 0, "per micro-batch"]
    ((name, predicted, _),) = found["memory"]["figures"]
    assert name == "predicted" and predicted > 1e-3
    for check in ("memory", "speed overlapped"):
        assert "a tiny model was" in found[check]["detail"], found[check]
