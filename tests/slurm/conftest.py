"""One mini-cluster for all tests of slurm/, and what a tiny run on it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.slurm.cluster import Cluster, missing_programs
from tests.support.tiny import tiny_llama, tiny_pair, tiny_tokenizer
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.data.sampler import MicrobatchOrder, recorded_pairs

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for path in (ROOT / "slurm").glob("*.sh") if "#SBATCH" in path.read_text())
PAIRS = 58  # the last global batch of an epoch is short


class Run(NamedTuple):
    """One training run: its recipe, and what it writes."""

    folder: Path
    recipe: Path

    def records(self) -> list[dict]:
        """Training metrics by step, without what differs from run to run."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines if line.endswith("\n")]

    def step(self) -> int:
        return max([record["step"] for record in self.records()], default=0)

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("*"))


class Files(NamedTuple):
    """What runs on the cluster start from."""

    folder: Path

    def run(self, name: str, **train: object) -> Run:
        """The recipe of a new run. Eight micro-batches per step on two pipeline ranks: slow enough to interfere."""
        keys = {"save_every": 5, "save_total_limit": 2, "record_pairs": "true", "output": self.folder / name, **train}
        recipe = self.folder / f"{name}.yaml"
        recipe.write_text(
            f"defaults: {ROOT}/recipes/tiny.yaml\nname: {name}\nrun: {self.folder}/shared\n"
            f"model:\n  hf: {self.folder}/hf\n"
            f"sample:\n  prompts: {self.folder}/pairs.jsonl\n  max_new_tokens: 8\n  seeds: [1, 2]\n  dtype: float32\n"
            f"rank:\n  scores: function\n  function: lengths:scores\n"
            f"label:\n  pairs: {self.folder}/pairs.jsonl\n  engine: megatron\n  tensor: 2\n  shard_pairs: 16\n"
            f"data:\n  global_batch_size: 8\n  epochs: 5\nparallel:\n  pipeline: 2\ntrain:\n"
            + "".join(f"  {key}: {value}\n" for key, value in keys.items())
            + f"export:\n  output: {self.folder}/{name}-hf\n"
        )
        return Run(self.folder / name, recipe)


@pytest.fixture(scope="session")
def cluster():
    if missing := missing_programs():
        if os.environ.get("CI") == "true":
            pytest.fail(f"not installed: {', '.join(missing)}; .ci/run installs them")
        pytest.skip(f"needs {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge")
    if (
        os.geteuid()
        or subprocess.run(
            [
                "unshare",
                "--mount",
                "--uts",
                "--pid",
                "--fork",
                "--mount-proc",
                "sh",
                "-c",
                "mount -t tmpfs none /mnt && hostname node",
            ],
            capture_output=True,
        ).returncode
    ):
        pytest.skip("a node is a set of namespaces, which only root makes, and not in every container")
    largest = max(
        int(line.split("=")[1])
        for script in SCRIPTS
        for line in script.read_text().splitlines()
        if line.startswith("#SBATCH --nodes=")
    )
    python_path = str(Path(sys.executable).parent)
    started = Cluster(
        largest + 1,
        {
            "PATH": f"{python_path}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "HOME": os.environ.get("HOME", "/root"),
            "TREG": str(ROOT),
            "PYTHON": sys.executable,
            "NODES": "2",
            "RANKS": "1",
            "OMP_NUM_THREADS": "1",
        },
    )
    yield started
    started.down()


@pytest.fixture
def slurm(cluster) -> Cluster:
    """The cluster, idle."""
    cluster.clear()
    yield cluster
    cluster.clear()


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    tiny_llama(folder / "hf", layers=4, vocab=tiny_tokenizer(folder / "hf"))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(tiny_pair(i, f"p{i}")) + "\n" for i in range(PAIRS)))
    (folder / "lengths.py").write_text(
        "def scores(messages, responses):\n    return [float(len(r)) for r in responses]\n"
    )
    made = Files(folder)
    for command in (
        ["tools/convert_checkpoint.py", "import"],
        ["tools/label_tokens.py", "label.engine=huggingface"],
        ["tools/index_pairs.py"],
    ):
        subprocess.run(
            [sys.executable, *command, "--recipe", str(made.run("made").recipe)],
            cwd=ROOT,
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
        )
    return made


@pytest.fixture(scope="session")
def uninterrupted(cluster, files) -> Run:
    """What every interrupted run must equal: treg_70b.sh from one end to the other, recipe and nodes checked before."""
    cluster.clear()
    run = files.run("uninterrupted")
    job = cluster.submit(ROOT / "slurm" / "treg_70b.sh", cwd=files.folder, RECIPE=str(run.recipe))
    cluster.wait(job, "COMPLETED")
    return run


def assert_same(found: Run, expected: Run) -> None:
    """The same metrics in every step, bit for bit, from the same pairs in the same order."""
    assert found.folder != expected.folder, "a run is always the same as itself"
    assert found.records() == expected.records()
    assert recorded_pairs(found.folder) == recorded_pairs(expected.folder)


def assert_complete(found: Run) -> None:
    """Metrics of every step, every pair once an epoch, and no half-written checkpoint."""
    steps = recorded_pairs(found.folder)
    assert [record["step"] for record in found.records()] == sorted(steps)
    data = section(load_recipe(found.recipe), "data")
    per_epoch = MicrobatchOrder(PAIRS, 1, data.global_batch_size, 0, 1).steps_per_epoch
    assert sorted(steps) == list(range(1, data.epochs * per_epoch + 1))
    for epoch in range(data.epochs):
        seen = [pair for step in range(epoch * per_epoch, (epoch + 1) * per_epoch) for pair in steps[step + 1]]
        assert sorted(seen) == sorted(f"p{i}" for i in range(PAIRS))
    assert not [name for name in found.checkpoints() if "unfinished" in name]


def log(files: Files, job: str) -> str:
    return next(files.folder.glob(f"*-{job}.log")).read_text()
