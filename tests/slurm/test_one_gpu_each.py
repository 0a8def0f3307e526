"""Tasks that see one GPU each, as `--gpus-per-task=1` with a binding gives them; nothing opens the device files."""

import re

from tests.slurm.conftest import ROOT, log


def test_tasks_with_a_gpu_each_pass_the_node_check_and_train(slurm, files, tmp_path):
    """The ranks are CPU processes: which device a task takes among those it sees is tested in tests/unit."""
    run = files.run("bound", max_steps=2)
    seen = tmp_path / "seen"
    python = tmp_path / "python"
    python.write_text(
        f'#!/usr/bin/env bash\necho "$2 $SLURM_LOCALID:$CUDA_VISIBLE_DEVICES" >>"{seen}"\n'
        f'exec {slurm.environment["PYTHON"]} "$@"\n'
    )
    python.chmod(0o755)
    options = ["--gpus-per-task=1", "--gpu-bind=single:1"]
    job = slurm.run(
        *("sbatch", "--parsable", *options, ROOT / "slurm" / "treg_8b.sh"),
        cwd=files.folder,
        RECIPE=str(run.recipe),
        CHECKS="nodes",
        NODES="1",
        RANKS="2",
        PYTHON=str(python),
    )
    slurm.wait(job, "COMPLETED")
    lines = seen.read_text().splitlines()
    for program in ("treg_megatron.node_check", "treg_megatron.train"):
        tasks = sorted(line.split()[1] for line in lines if line.startswith(program))
        assert len(tasks) == 2 and all(re.fullmatch(r"[01]:\d", task) for task in tasks), lines
        assert len({task.split(":")[1] for task in tasks}) == 2, "each task has its own"
    assert "nodes: 1 with 2 ranks each" in log(files, job) and run.step() == 2
