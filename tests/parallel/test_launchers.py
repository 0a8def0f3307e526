"""Training under a launcher that Lightning does not know."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.support.training import records

ROOT = Path(__file__).resolve().parents[2]


def test_under_open_mpi(tied_run, tmp_path):
    """Two pipeline ranks; Lightning starts no further processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    overrides = tied_run.sections(tmp_path / "out", "parallel.pipeline=2", "train.max_steps=2", "data.validation=null")
    command = [sys.executable, "-m", "treg_megatron.train", "--recipe", str(tied_run.recipe), *overrides]
    ours = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ
            | ours
            | {f"OMPI_COMM_WORLD_{name}RANK": str(rank) for name in ("", "LOCAL_")}
            | {f"OMPI_COMM_WORLD_{name}SIZE": "2" for name in ("", "LOCAL_")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=200)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert said[0].count("done: 2 steps") == 1 and "done" not in said[1]
    assert [record["step"] for record in records(tmp_path / "out")] == [1, 2]
