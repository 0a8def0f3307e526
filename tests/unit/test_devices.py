"""The device of each process, on machines that these tests pretend to run on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from treg_megatron.distributed.launch import RankInfo, device_index, require_device, require_same_device, take_device
from treg_megatron.errors import UserError
from treg_megatron.preflight import nodes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def machine(monkeypatch):
    """Function that pretends that this process sees so many GPUs; returns the list of devices that were set."""

    def pretend(gpus: int) -> list[int]:
        chosen: list[int] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        return chosen

    return pretend


@pytest.mark.parametrize("visible, devices", [(4, [0, 1, 2, 3]), (1, [0, 0, 0, 0])])
def test_a_process_takes_its_gpu_among_those_that_it_sees(machine, visible, devices):
    chosen = machine(visible)
    for local_rank in range(4):
        take_device(RankInfo(local_rank, 4, local_rank, 4))
    assert chosen == devices == [device_index(local_rank) for local_rank in range(4)]


def test_without_gpus_no_device_is_set(machine):
    chosen = machine(0)
    take_device(RankInfo(0, 1, 0, 1))
    assert chosen == []


def broken(device: int) -> None:
    raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be ...")


def test_a_broken_gpu_is_named_in_one_line(machine, monkeypatch):
    machine(8)
    monkeypatch.setattr(torch.cuda, "set_device", broken)
    with pytest.raises(UserError, match=r"^GPU 3 of \S+ cannot be used: CUDA error: uncorrectable ECC [^\n]+$"):
        take_device(RankInfo(3, 8, 3, 8))


def test_the_node_check_names_the_node_of_a_broken_gpu(machine, monkeypatch):
    machine(1)
    monkeypatch.setattr(torch.cuda, "set_device", broken)
    with pytest.raises(UserError, match=r"^the devices of \S+ give wrong results or errors: exclude"):
        nodes.devices(RankInfo(0, 1, 0, 1), dist.HashStore())


def test_a_recipe_for_gpus_does_not_run_on_the_cpu(machine):
    machine(0)
    with pytest.raises(UserError, match=r"cluster.device=gpu\), but on \S+ torch sees none that it can use"):
        require_device("gpu")
    require_device("cpu")
    machine(1)
    require_device("gpu"), require_device("cpu")


def test_a_rank_without_the_gpu_that_others_have():
    store = dist.HashStore()
    require_same_device(RankInfo(0, 2, 0, 1), store, "GPU")
    require_same_device(RankInfo(1, 2, 0, 1), store, "GPU")
    with pytest.raises(UserError, match=r"^rank 1 on \S+ runs on a CPU, rank 0 on \S+ on a GPU"):
        require_same_device(RankInfo(1, 2, 0, 1), store, "CPU")


@pytest.mark.slow
def test_packages_that_need_a_gpu_are_not_used_on_a_cpu(tmp_path):
    """Transformer Engine and Apex fail when they find no GPU; on CPUs the rest of the stack must not find them."""
    for package in ("transformer_engine", "apex", "amp_C"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise AssertionError('used without a GPU')")
    program = (
        "from treg_megatron.distributed.cpu_redirect import use_cpu; use_cpu()\n"
        "from treg_megatron.models import build; from treg_megatron.distributed import stack\n"
        "print(build.policies.HAVE_TE, stack.describe_stack(stack.require_stack()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("False ") and "layers: torch (no Transformer Engine) | Adam: torch" in done.stdout
