"""Checks of nodes, ranks and checkpoints before a job starts."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from treg_megatron.checkpoint.layout import CheckpointMetadata, damage, fingerprints, newest_checkpoint, write_metadata
from treg_megatron.config.recipe import described, trace_recipe, value
from treg_megatron.data.sampler import recorded_pairs
from treg_megatron.distributed.launch import MPI, RankInfo, rank_info, require_single_process, was_launched
from treg_megatron.errors import UserError
from treg_megatron.preflight.nodes import verdict

ROOT = Path(__file__).resolve().parents[2]
SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_NODES": "2"}
BATCH_STEP = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_NNODES": "2"}
ADDRESS = {"MASTER_ADDR": "node1", "MASTER_PORT": "20000"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
JSRUN = {name.replace("OMPI_COMM_WORLD", "JSM_NAMESPACE"): number for name, number in OPEN_MPI.items()}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
PALS = {"PALS_RANKID": "5", "PMI_SIZE": "8", "PALS_LOCAL_RANKID": "1", "PMI_LOCAL_SIZE": "4"}
PLAIN = {"RANK": "5", "WORLD_SIZE": "8"}


@pytest.fixture
def launched(monkeypatch):
    """Function that sets a launcher's variables, after removing those of any other launcher."""
    others = [name for launcher in MPI for names in launcher[1:] for name in names]
    for name in [n for n in os.environ if n.startswith(("SLURM_", "TORCHELASTIC"))] + others:
        monkeypatch.delenv(name, raising=False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return lambda **variables: [monkeypatch.setenv(name, text) for name, text in variables.items()]


def test_ranks_from_srun(launched):
    launched(**SLURM)
    assert rank_info() == RankInfo(5, 8, 1, 4) and rank_info().nodes == 2


def test_ranks_without_a_launcher(launched):
    assert rank_info() == RankInfo(0, 1, 0, 1)


def test_uneven_nodes_are_refused(launched):
    launched(**SLURM | {"SLURM_STEP_NUM_TASKS": "7"})
    with pytest.raises(UserError, match="7 processes do not divide evenly"):
        rank_info()


@pytest.mark.parametrize("variables", [OPEN_MPI, JSRUN, HYDRA, PALS, PLAIN | {"LOCAL_RANK": "1"}])
def test_every_launcher_is_understood_or_refused(variables, launched):
    """Never rank 0 of 1 for each of its processes."""
    launched(**variables)
    assert was_launched()
    with pytest.raises(UserError, match="started 8 processes that do not know each other: set MASTER_ADDR and MASTER"):
        rank_info()
    with pytest.raises(UserError, match="treg export is a single process, and .* started 8: start one"):
        require_single_process("treg export")
    launched(**ADDRESS, **({"LOCAL_WORLD_SIZE": "4"} if "RANK" in variables else {}))
    assert rank_info() == RankInfo(5, 8, 1, 4)
    launched(**BATCH_STEP | {"SLURM_STEP_NUM_TASKS": "2"})  # mpirun's daemons, one per node, were started by srun
    assert rank_info() == RankInfo(5, 8, 1, 4)


def test_pods_of_one_process_each(launched):
    launched(**PLAIN, **ADDRESS)
    assert rank_info() == RankInfo(5, 8, 0, 1)


def test_srun_with_pmi(launched):
    launched(**SLURM, PMI_RANK="5", PMI_SIZE="8")
    assert rank_info() == RankInfo(5, 8, 1, 4)


def test_a_batch_script_is_a_single_process(launched):
    """Slurm tells it, too, how many tasks the job has."""
    launched(**BATCH_STEP)
    assert rank_info() == RankInfo(0, 1, 0, 1) and not was_launched()
    require_single_process("treg import")


def test_a_tool_started_by_srun_as_several_refuses_once(tmp_path):
    command = [sys.executable, ROOT / "tools" / "convert_checkpoint.py", "import", "--hf", "a", "--checkpoint", "b"]
    variables = SLURM | {"SLURM_PROCID": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=os.environ | variables, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == (
        "error: convert_checkpoint.py import is a single process, and srun started 8: start one (srun --ntasks=1)\n"
    )


def node(name: str, **differs) -> dict:
    return {
        "node": name,
        "packages": {"python": "3.11.7", "torch": "2.13.0"},
        "inputs": {"data.train=s": "aa"},
        "probe": True,
        "free": 10**12,
    } | differs


@pytest.mark.parametrize(
    "second, pattern",
    [
        ({}, "^$"),
        ({"packages": {"python": "3.11.7", "torch": "2.12.0"}}, "^n2 has torch 2.12.0, the others have 2.13.0"),
        ({"packages": {"python": "3.11.7"}}, "^n2 has torch not installed, the others have 2.13.0"),
        ({"inputs": {"data.train=s": None}}, "^n2 does not see data.train=s"),
        ({"inputs": {"data.train=s": "bb"}}, "^n2 sees a different file than the others as data.train=s"),
        ({"probe": False}, r"^n2 does not see /out \(train.output\) as n1 does"),
        ({"free": 10**9}, r"^n2 has 1.0 GB free in /out \(train.output\), the checkpoints need 5.0 GB"),
        ({"silent": True}, "^n2 did not answer"),
    ],
)
def test_the_odd_node_out_is_named(second, pattern):
    assert re.search(pattern, verdict([node("n1"), node("n2", **second), node("n3")], 5 * 10**9, Path("/out")))


def test_an_input_that_no_node_sees():
    nodes = [node(name, inputs={"data.train=s": None}) for name in ("n1", "n2")]
    assert verdict(nodes, 0, Path("/out")).startswith("n1 does not see data.train=s; n2 does not see data.train=s. Fix")


def checkpoint(run: Path, step: int, size: int) -> Path:
    folder = run / "checkpoints" / f"step_{step:06d}"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "a.distcp").write_bytes(os.urandom(size))
    identity = CheckpointMetadata(family="Llama", hf_config={}, dtype="float32", source="", written_by="")
    write_metadata(folder, dataclasses.replace(identity, files=fingerprints(folder)))
    return folder


@pytest.mark.parametrize("size", [1000, 9_000_000])
@pytest.mark.parametrize(
    "damaged, wrong",
    [
        ("end", "is not what was written"),
        ("cut", "has {cut} bytes, {size} bytes were written"),
        ("gone", "is missing"),
        ("start", "is not what was written"),
    ],
)
def test_a_damaged_newest_checkpoint_is_skipped(damaged, wrong, size, tmp_path, caplog):
    checkpoint(tmp_path, 5, size)
    newest = checkpoint(tmp_path, 10, size)
    assert newest_checkpoint(tmp_path) == newest and damage(newest) is None
    part = newest / "weights" / "a.distcp"
    content = bytearray(part.read_bytes())
    if damaged == "gone":
        part.unlink()
    else:
        content[0 if damaged == "start" else -1] ^= 1
        part.write_bytes(content[:-1] if damaged == "cut" else content)
    assert newest_checkpoint(tmp_path).name == "step_000005"
    assert f"step_000010 is damaged (weights/a.distcp {wrong.format(cut=size - 1, size=size)})" in caplog.text


def test_single_values_and_description_of_a_recipe():
    recipe, sources = trace_recipe(ROOT / "recipes" / "tiny.yaml", ["run=/r"])
    assert value(recipe, "train.output") == "/r/train"
    with pytest.raises(UserError, match="label.model.*model.hf"):
        value(recipe, "label.model")
    text = described(recipe, sources)
    assert "output: /r/train" in text and "hf: ???" in text and "model: ${model.hf}" in text


def test_recorded_pairs_are_read_over_all_ranks(tmp_path):
    (tmp_path / "pairs").mkdir()
    for rank, lines in enumerate(
        ['{"step": 1, "pairs": ["a"]}\n{"step": 2, "pairs": ["b"]}\n', '{"step": 1, "pairs": ["c"]}\n']
    ):
        (tmp_path / "pairs" / f"rank_{rank:05d}.jsonl").write_text(lines)
    assert recorded_pairs(tmp_path) == {1: ["a", "c"], 2: ["b"]}


def test_an_error_on_a_single_rank_is_printed_by_that_rank():
    program = (
        "from treg_megatron.utils import entry\nentry.RANK_ZERO_SECONDS = 0\n"
        "def main(): raise entry.UserError('no folder')\nentry.run(main)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"RANK": "3"}, capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stderr == "error on rank 3: no folder\n"
