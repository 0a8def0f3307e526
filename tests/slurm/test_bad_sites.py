"""Sites where something is wrong: one clear line that names it, and nothing lost."""

import importlib.metadata
import re
import socket
import subprocess

from tests.slurm.conftest import ROOT, assert_complete, assert_same, log

SCRIPT = ROOT / "slurm" / "treg_70b.sh"


def refused(slurm, files, run, pattern: str, **variables: str) -> None:
    """The job fails, with one error line that matches."""
    job = slurm.submit(SCRIPT, cwd=files.folder, RECIPE=str(run.recipe), **{"CHECKS": "nodes", **variables})
    slurm.wait(job, "FAILED")
    text = log(files, job)
    errors = [line for line in text.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and re.search(pattern, errors[0]) and "Traceback" not in text, text


def test_a_node_without_the_shared_folder(slurm, files):
    shared = str(files.folder / "shared")
    slurm.inside("node2", "mount", "-t", "tmpfs", "none", shared)
    try:
        refused(
            slurm,
            files,
            files.run("unshared"),
            f"node2 does not see data.train={shared}/streams/train; "
            f"node2 does not see model.checkpoint={shared}/megatron",
        )
    finally:
        slurm.inside("node2", "umount", "--lazy", shared)


def test_a_node_whose_output_folder_is_its_own(slurm, files):
    """It has the folder, but what node1 writes there does not appear."""
    run = files.run("local")
    run.folder.mkdir()
    slurm.inside("node2", "mount", "-t", "tmpfs", "none", str(run.folder))
    try:
        refused(slurm, files, run, rf"node2 does not see {run.folder} \(train.output\) as node1 does")
    finally:
        slurm.inside("node2", "umount", "--lazy", str(run.folder))


def test_a_node_with_another_version_of_a_package(slurm, files, tmp_path):
    metadata = importlib.metadata.distribution("einops")
    found = next(path for path in metadata.files if path.name == "METADATA").locate()
    other = tmp_path / "METADATA"
    other.write_text(re.sub(r"\nVersion: .*", "\nVersion: 0.0.1", found.read_text()))
    slurm.inside("node2", "mount", "--bind", str(other), str(found))
    try:
        refused(
            slurm, files, files.run("versions"), f"node[12] has einops .*, the others have (0.0.1|{metadata.version})"
        )
    finally:
        slurm.inside("node2", "umount", "--lazy", str(found))


def test_a_port_that_is_taken(slurm, files):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused(slurm, files, files.run("port"), f"port {port} of node1 is taken", MASTER_PORT=str(port))


def test_a_disk_that_fills_up_while_saving(slurm, files, uninterrupted):
    """The second checkpoint does not fit: it goes, the first stays, and with more room the same job ends as ever."""
    run = files.run("full", output=slurm.small_disk / "run")._replace(folder=slurm.small_disk / "run")
    refused(
        slurm,
        files,
        run,
        r"step_000010 could not be written: No space left on device; step_000005 is complete: free disk space",
        CHECKS="",
    )
    assert run.checkpoints() == ["step_000005"]
    subprocess.run(["mount", "-o", "remount,size=200m", slurm.small_disk], check=True)
    job = slurm.submit(SCRIPT, cwd=files.folder, RECIPE=str(run.recipe), CHECKS="")
    slurm.wait(job, "COMPLETED")
    assert_complete(run)
    assert_same(run, uninterrupted)
