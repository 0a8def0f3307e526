"""Jobs submitted from another folder, with options, without an environment, and where submitting again is forbidden."""

import os
import shutil
import sys
from pathlib import Path

from tests.slurm.conftest import ROOT
from tests.slurm.test_survival import wait_for_step


def test_from_another_folder_with_a_chain_that_keeps_the_options(slurm, files, tmp_path):
    """The recipe is the script's own, the path has a space. The model is nowhere: the job fails, the successor goes."""
    clone = files.folder / "a clone"
    clone.symlink_to(ROOT)
    script, override = clone / "slurm" / "treg_70b.sh", "model.hf=/nowhere at all"
    options = ["--nodes=3", "--time=17", "--partition=high", "--exclude=node1", "--job-name=again"]
    options.append("--ntasks-per-node=1")
    job = slurm.run(
        "sbatch", "--parsable", *options, script, override, cwd=tmp_path, TREG=str(clone), CHAIN="1", CHECKS=""
    )
    slurm.wait(job, "FAILED")
    text = (tmp_path / f"again-{job}.log").read_text()
    [error] = [line for line in text.splitlines() if line.startswith("error")]
    assert "recipe" not in error and "runs/llama3_70b" in error, text
    successor = text.split("successor: job ")[1].split()[0]
    slurm.wait(successor, "CANCELLED", seconds=30)
    kept = {"NumNodes": "3", "TimeLimit": "00:17:00", "Partition": "high", "ExcNodeList": "node1", "JobName": "again"}
    assert {name: slurm.field(successor, name) for name in kept} == kept
    assert slurm.field(successor, "NtasksPerN:B:S:C") == "1:0:*:*"
    assert f"Command={script} {override}\n" in slurm.run("scontrol", "show", "job", successor)


def test_without_an_environment_a_successor_or_a_requeue(slurm, files):
    """sbatch --export=NONE; site.sh says everything. Its node may not submit, its job may not be requeued."""
    run = files.run("forbidden", save_every=1000)
    clone = _clone(files.folder / "clone")
    (clone / "slurm" / "site.sh").write_text(
        f"echo $not_set_by_conda >/dev/null; false\n"
        f"export PYTHON={sys.executable} PATH='{slurm.environment['PATH']}' OMP_NUM_THREADS=1\n"
        f"NODES=2 RANKS=1 RECIPE={run.recipe} CHECKS= CHAIN=1\n"
        'MASTER_ADDR="$(getent hosts "$(first_node)" | cut -d " " -f 1)"\n'
    )
    sbatch = shutil.which("sbatch")
    slurm.inside("node1", "mount", "--bind", "/bin/false", sbatch)
    try:
        job = slurm.run(
            *("sbatch", "--parsable", "--export=NONE", "--no-requeue", "--nodes=2", "--nodelist=node1,node2"),
            *(clone / "slurm" / "treg_70b.sh", "train.record_pairs=false"),
            cwd=clone,
        )
        wait_for_step(run, 3)
        slurm.run("scancel", "--signal=USR1", job)
        slurm.wait(job, "FAILED")
    finally:
        slurm.inside("node1", "umount", sbatch)
    text = (clone / f"treg_70b-{job}.log").read_text()
    assert "no successor: jobs cannot be submitted from node1" in text
    assert "2 ranks, rank 0 at 127.0.1.1:" in text
    assert "stopped by a signal, everything saved" in text and slurm.field(job, "ExitCode") == "85:0"
    assert text.rstrip().endswith(f"sbatch {clone}/slurm/treg_70b.sh train.record_pairs=false")
    assert len(run.checkpoints()) == 1


def _clone(folder: Path) -> Path:
    """What a checkout holds that a job needs."""
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    for name in ("treg_megatron", "tools", "recipes"):
        os.symlink(ROOT / name, folder / name)
    return folder
