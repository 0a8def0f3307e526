"""`treg accept` on CPU ranks: the command as a user starts it."""

import json

import pytest

from tests.pipeline.conftest import run_command

EXPECTED = {
    "collectives": "PASS",
    "train PP2": "PASS",
    "train TP2+SP overlap": "not run",
    "train offload": "PASS",
    "without TE": "not run",
    "host syncs": "PASS",
    "memory": "not run",
    "speed overlapped": "not run",
}


@pytest.fixture(scope="module")
def checks(tmp_path_factory) -> dict[str, dict]:
    """The answers to some checks by name, of one run without failures."""
    card = tmp_path_factory.mktemp("accept") / "card"
    done = run_command("-m", "treg_megatron", "accept", "--cpu", "--output", card, "--only", *EXPECTED, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((card / "acceptance.json").read_text())
    assert found["finished"] and "0 FAIL" in (card / "acceptance.md").read_text()
    return {check["name"]: check for check in found["checks"]}


def test_on_cpu_ranks(checks):
    assert {name: check["status"] for name, check in checks.items()} == {"inputs": "PASS", **EXPECTED}


def test_what_is_measured_on_gpus_takes_the_same_path_on_cpu_ranks(checks):
    assert checks["host syncs"]["figures"][0] == ["host_syncs", 0, "per micro-batch"]
    ((name, predicted, _),) = checks["memory"]["figures"]
    assert name == "predicted" and predicted > 1e-3
    for check in ("memory", "speed overlapped"):
        assert "a tiny model was" in checks[check]["detail"], checks[check]
