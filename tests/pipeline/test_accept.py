"""`treg accept` on CPU ranks: the command as a user starts it."""

import json

from tests.pipeline.conftest import run_command


def test_on_cpu_ranks(tmp_path):
    card = tmp_path / "card"
    done = run_command(
        "-m", "treg_megatron", "accept", "--cpu", "--output", card, "--only", "collectives", "train PP2", "without TE"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((card / "acceptance.json").read_text())
    answers = {check["name"]: check["status"] for check in found["checks"]}
    assert answers == {"inputs": "PASS", "collectives": "PASS", "train PP2": "PASS", "without TE": "not run"}
    assert found["finished"] and "0 FAIL" in (card / "acceptance.md").read_text()
