"""CUDA_DEVICE_MAX_CONNECTIONS on machines that these tests pretend to run on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.distributed import connections
from treg_megatron.distributed.connections import VARIABLE, set_connections

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Function that sets what nvidia-smi answers, or that there is none; the variable is not set."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)

    def pretend(answer: str | None) -> None:
        if answer is not None:
            (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{answer}\n")
            (tmp_path / "nvidia-smi").chmod(0o755)

    yield pretend
    os.environ.pop(VARIABLE, None)


def parallel(*overrides: str):
    return section(load_recipe(ROOT / "recipes" / "tiny.yaml", list(overrides)), "parallel")


@pytest.mark.parametrize(
    "answer, overrides, found",
    [
        ("echo 9.0; echo 9.0", ["parallel.tensor=2"], "1"),
        ("echo 8.0", ["parallel.context=2"], "1"),
        ("echo 10.0", ["parallel.tensor=2"], "32"),
        ("echo 12.0", ["parallel.context=2"], "32"),
        ("echo 9.0", [], None),
        ("echo 10.0", ["parallel.pipeline=2"], None),
        ("echo 'Field \"compute_cap\" is not a valid field'; exit 2", ["parallel.tensor=2"], "1"),
        (None, ["parallel.tensor=2"], None),
    ],
)
def test_as_the_layout_and_the_gpus_want_it(answer, overrides, found, machine):
    machine(answer)
    set_connections(parallel(*overrides))
    assert os.environ.get(VARIABLE) == found


@pytest.mark.parametrize("own, said", [("8", True), ("1", False)])
def test_a_value_of_the_user_stays_and_is_named_if_it_differs(own, said, machine, monkeypatch, caplog):
    machine("echo 9.0")
    monkeypatch.setenv(VARIABLE, own)
    set_connections(parallel("parallel.tensor=2"))
    assert os.environ[VARIABLE] == own
    expected = "CUDA_DEVICE_MAX_CONNECTIONS=8, as the environment says; on these GPUs this layout wants 1"
    assert caplog.messages == ([expected] if said else [])


def test_a_silent_nvidia_smi_does_not_hold_up_training(machine, monkeypatch):
    machine("exec /bin/sleep 60")
    monkeypatch.setattr(connections, "SMI_SECONDS", 0.2)
    set_connections(parallel("parallel.tensor=2"))
    assert os.environ[VARIABLE] == "1"


def test_it_is_set_before_torch_is_asked_for_a_device():
    """CUDA reads the variable once."""
    program = (
        "import torch, treg_megatron.train as train; order = []\n"
        "train.set_connections = lambda parallel: order.append('connections')\n"
        "torch.cuda.is_available = lambda: order.append('torch')\n"
        "from types import SimpleNamespace as Plan\n"
        "from treg_megatron.config.recipe import load_recipe\n"
        "recipe = load_recipe('recipes/tiny.yaml', ['cluster.device=gpu'])\n"
        "try: train.set_up_stack(Plan(parallel=None, recipe=recipe))\n"
        "except Exception as error: print(order, type(error).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "['connections', 'torch'] UserError\n", done.stderr
