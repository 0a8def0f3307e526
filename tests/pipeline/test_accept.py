"""`treg accept` on CPU ranks: the command as a user starts it."""

import json

from tests.pipeline.conftest import run_command


def test_on_cpu_ranks(tmp_path):
    card = tmp_path / "card"
    expected = {
        "inputs": "PASS",
        "collectives": "PASS",
        "train PP2": "PASS",
        "train TP2+SP overlap": "not run",
        "train offload": "PASS",
        "without TE": "not run",
        "host syncs": "PASS",
        "memory": "not run",
        "speed overlapped": "not run",
    }
    done = run_command("-m", "treg_megatron", "accept", "--cpu", "--output", card, "--only", *list(expected)[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((card / "acceptance.json").read_text())
    by_name = {check["name"]: check for check in found["checks"]}
    assert {name: check["status"] for name, check in by_name.items()} == expected
    assert found["finished"] and "0 FAIL" in (card / "acceptance.md").read_text()
    assert by_name["host syncs"]["figures"][0] == ["host_syncs", 0, "per micro-batch"]
    # what needs no GPU has run: preflight's prediction, and the trainings whose memory and rate say nothing here
    assert by_name["memory"]["figures"][0][0] == "predicted" and by_name["memory"]["figures"][0][1] > 1e-3
    for name in ("memory", "speed overlapped"):
        assert "a tiny model was" in by_name[name]["detail"], by_name[name]
