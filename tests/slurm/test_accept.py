"""slurm/accept.sh as a job: one task on one node, whose checks start ranks of their own."""

import json

from tests.slurm.conftest import ROOT


def test_a_job_writes_the_card_of_its_node(slurm, tmp_path):
    arguments = ["--cpu", "--only", "collectives", "train PP2"]
    job = slurm.submit(ROOT / "slurm" / "accept.sh", *arguments, cwd=tmp_path)
    slurm.wait(job, "COMPLETED")
    card = tmp_path / f"acceptance-{job}"
    found = json.loads((card / "acceptance.json").read_text())
    answers = {check["name"]: check["status"] for check in found["checks"]}
    assert found["finished"] and answers == {"inputs": "PASS", "collectives": "PASS", "train PP2": "PASS"}
    log = (tmp_path / f"accept-{job}.log").read_text()
    assert f"3 of 3 checks without a failure, see {card.name}/acceptance.md" in log
