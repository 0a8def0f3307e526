"""Device labels: what CUDA and NCCL would refuse is refused on CPU ranks, and the project's steps pass."""

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tests.support.forked import run_ranks
from tests.support.training import TinyRun, records, run_and_kill, train_on_this_rank
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.distributed import device_labels
from treg_megatron.distributed.device_labels import DeviceFault, on_cuda
from treg_megatron.distributed.launch import connect_store, rank_info
from treg_megatron.labelling.job import label
from treg_megatron.models import policy
from treg_megatron.preflight import nodes


def labelled(function: Callable, *args):
    """Call a function with labels on; they stay on in this process, a forked rank."""
    device_labels.install()
    return function(*args)


def line_of(function: Callable, text: str) -> str:
    """Where a function of this project contains a text, as a fault names it."""
    lines, first = inspect.getsourcelines(function)
    number = next(i for i, line in enumerate(lines) if text in line)
    return f"{inspect.getsourcefile(function)}:{first + number}"


def train(files: TinyRun, output, size: int, *overrides: str) -> list[dict]:
    overrides = files.sections(output, "data.epochs=4", "train.max_steps=2", *overrides)
    run_ranks(size, labelled, train_on_this_rank, files.recipe, overrides, log=output.with_suffix(".log"))
    return records(output)


# Tensors on their own.


def refused(function: Callable, *args) -> bool:
    try:
        function(*args)
    except DeviceFault as fault:
        assert "test_device_labels.py:" in str(fault)
        return True
    return False


def check_tensors() -> None:
    host, cuda = torch.arange(4.0), torch.arange(4.0).cuda()
    assert cuda.device == torch.device("cuda", 0) and cuda.is_cuda and not cuda.is_cpu and cuda.get_device() == 0
    assert host.device == torch.device("cpu") and host.is_cpu and not host.is_cuda
    for made in (cuda * 2, cuda[1:], torch.zeros(2, device="cuda"), cuda.new_tensor([1]), host.to(cuda), host.to(0)):
        assert on_cuda(made)
    for made in (host * 2, cuda.cpu(), cuda.to("cpu"), torch.zeros_like(cuda, device="cpu"), cuda.cpu().to(host)):
        assert not on_cuda(made)
    copy = host.cuda()
    host[0] = 7
    assert copy.cpu()[0] == 0 and cuda.cuda() is cuda and host.cpu() is host
    module = torch.nn.Linear(4, 4).cuda()
    module(cuda).sum().backward()
    assert on_cuda(module.weight.grad)


def check_mixes() -> None:
    host, cuda = torch.arange(4.0), torch.arange(4.0).cuda()
    index = torch.tensor([0, 1])
    for scalar_on_the_host in (lambda: cuda * torch.tensor(2.0), lambda: cuda[index], lambda: cuda.copy_(host)):
        assert not refused(scalar_on_the_host)
    for mix in (
        lambda: cuda + host,
        lambda: host * cuda.sum(),
        lambda: cuda.index_select(0, index),
        lambda: host[index.cuda()],
        lambda: torch.stack([cuda.sum(), host.sum()]),
        lambda: torch.tensor(0.0).add_(cuda.sum()),
        lambda: torch.cat([cuda, host]),
        lambda: cuda.numpy(),
    ):
        assert refused(mix)


def check_syncs() -> None:
    cuda = torch.arange(4.0).cuda()
    syncs = [
        lambda: cuda.sum().item(),
        lambda: cuda.tolist(),
        lambda: bool(cuda.sum() > 0),
        lambda: cuda.nonzero(),
        lambda: cuda[cuda > 1],
        lambda: cuda.cpu(),
        lambda: cuda.to("cpu"),
        lambda: cuda[torch.tensor([0, 1])],
        lambda: cuda[[0, 1]],
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: torch.zeros(3).cuda(),
        lambda: torch.repeat_interleave(cuda, torch.ones(4, dtype=torch.int64, device="cuda")),
        lambda: torch.cuda.synchronize(),
        lambda: torch.cuda.current_stream().synchronize(),
    ]
    no_syncs = [
        lambda: torch.zeros(3).cuda(non_blocking=True),
        lambda: cuda.masked_fill(cuda > 1, 0.0),
        lambda: torch.zeros(3, device="cuda"),
        lambda: cuda[torch.zeros(2, dtype=torch.int64, device="cuda")],
    ]
    assert not any(map(refused, [*syncs, *no_syncs])), "between micro-batches the host may wait"
    with device_labels.labels.set(in_flight=1):
        for sync in syncs:
            assert refused(sync), inspect.getsource(sync)
        assert not any(map(refused, no_syncs))


def check_collectives() -> None:
    dist.init_process_group("nccl")
    host, cuda = torch.ones(2), torch.ones(2).cuda()
    served_by_gloo = dist.new_group(backend="gloo")
    dist.all_reduce(cuda)
    dist.all_reduce(cuda, group=dist.new_group([0]))
    dist.all_reduce(host, group=served_by_gloo)
    dist.barrier()
    objects = [3]
    dist.broadcast_object_list(objects)
    assert objects == [3]
    assert refused(dist.all_reduce, host)
    assert refused(dist.all_gather_into_tensor, torch.zeros(2).cuda(), host)


@pytest.mark.parametrize("check", [check_tensors, check_mixes, check_syncs, check_collectives])
def test_labels(check):
    run_ranks(1, labelled, check)


# Planted faults: each is caught in a real training, with its place.


def item_in_the_loss(values, *rest):
    values.sum().item()
    return LOSS(values, *rest)


def all_reduce_on_the_host(values, *rest):
    dist.all_reduce(torch.ones(2))
    return LOSS(values, *rest)


def rows_on_the_host(iterator):
    batch = next(iterator)[0]
    return {k: v.cuda(non_blocking=True) if k != "rows" and torch.is_tensor(v) else v for k, v in batch.items()}


LOSS = policy.preference_loss
FAULTS = {
    "item": ("preference_loss", item_in_the_loss, (item_in_the_loss, ".item()"), "item"),
    "all_reduce": ("preference_loss", all_reduce_on_the_host, (all_reduce_on_the_host, "dist.all_reduce"), "NCCL"),
    "index_select": ("data_step", rows_on_the_host, (policy.ResponseGPTModel._postprocess, "index_select"), "mixes"),
}


def train_with_fault(name: str, files: TinyRun, overrides: list[str]) -> str:
    attribute, planted, *_ = FAULTS[name]
    setattr(policy, attribute, planted)
    try:
        labelled(train_on_this_rank, files.recipe, overrides)
    except DeviceFault as fault:
        return str(fault)
    return ""


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name, tied_run, tmp_path):
    _, _, place, what = FAULTS[name]
    overrides = tied_run.sections(tmp_path / "out", "train.max_steps=1", "data.validation=null")
    (found,) = run_ranks(1, train_with_fault, name, tied_run, overrides, log=tmp_path / "log")
    assert found.startswith(line_of(*place)) and what in found and "\n" not in found


# The project's own steps.


@pytest.mark.parametrize(
    "size, layout",
    [
        (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
        (2, ["parallel.context=2"]),
        (1, ["lora.rank=4", "lora.alpha=16"]),
    ],
    ids=["TP2xPP2", "CP2", "LoRA"],
)
def test_training_and_validation(size, layout, tied_run, tmp_path):
    out = tmp_path / "out"
    assert len(train(tied_run, out, size, *layout)) == 2 and len(records(out, validation=True)) == 2


def test_resuming(tied_run, tmp_path):
    run_and_kill(tied_run, tmp_path / "out", 1, 2, "train.save_every=1")
    overrides = tied_run.sections(tmp_path / "out", "data.epochs=4", "train.save_every=1", "train.max_steps=4")
    run_ranks(1, labelled, train_on_this_rank, tied_run.recipe, overrides, log=tmp_path / "log")
    assert len(records(tmp_path / "out")) == 4


@pytest.mark.parametrize("engine, ranks", [("megatron", 2), ("huggingface", 1)])
def test_labelling(engine, ranks, tied_run, tmp_path):
    overrides = [
        *tied_run.overrides,
        f"label.pairs={tied_run.hf.parent}/heldout.jsonl",
        f"label.engine={engine}",
        "label.device=cuda",
        f"label.pipeline={ranks}",
        f"label.output={tmp_path}",
    ]
    job = section(load_recipe(tied_run.recipe, overrides), "label")
    assert any(run_ranks(ranks, labelled, label, job))


def check_devices() -> None:
    torch.cuda.is_available = lambda: True
    nodes.devices(rank_info(), connect_store(rank_info()))


def test_node_check():
    run_ranks(2, labelled, check_devices)
