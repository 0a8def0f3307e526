"""Every kind of collective that training uses, once, as one rank: `torchrun -m treg_megatron.accept.collectives`.

Each must give the right sum, and each moves tensors of the device that the backend serves.
"""

import json
import sys
import time

import torch
import torch.distributed as dist

from treg_megatron.distributed.launch import destroy_process_group, init_process_group, rank_info

TIMEOUT_SECONDS = 60.0
BANDWIDTH_BYTES = 256 << 20
CPU_BANDWIDTH_BYTES = 8 << 20


def main() -> None:
    """Run all of them; rank 0 prints the rate of an all-reduce as JSON."""
    ranks = rank_info()
    init_process_group(ranks, TIMEOUT_SECONDS)
    cuda = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    for name, action in COLLECTIVES.items():
        try:
            action(ranks.rank, ranks.size, device)
        except Exception as error:
            sys.exit(f"error: {name}: {str(error).splitlines()[0]}")
    rate = _all_reduce_rate(device, BANDWIDTH_BYTES if cuda else CPU_BANDWIDTH_BYTES)
    if ranks.rank == 0:
        print(json.dumps({"all_reduce_gb_per_s": rate}))
    destroy_process_group()


def _equal(found: torch.Tensor, expected: float) -> None:
    if not torch.all(found == expected):
        raise ArithmeticError(f"gave {found.flatten()[0].item():g}, expected {expected:g}")


def _all_reduce(rank: int, size: int, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        tensor = torch.full((1000,), rank + 1, dtype=dtype, device=device)
        dist.all_reduce(tensor)
        _equal(tensor, size * (size + 1) / 2)
    dist.all_reduce(tensor.fill_(rank), op=dist.ReduceOp.MAX)
    _equal(tensor, size - 1)


def _all_gather(rank: int, size: int, device: torch.device) -> None:
    gathered = torch.empty(size * 10, device=device)
    dist.all_gather_into_tensor(gathered, torch.full((10,), float(rank), device=device))
    _equal(gathered.view(size, 10) - torch.arange(size, device=device)[:, None], 0)


def _reduce_scatter(rank: int, size: int, device: torch.device) -> None:
    mine = torch.empty(10, device=device)
    dist.reduce_scatter_tensor(mine, torch.arange(float(size), device=device).repeat_interleave(10))
    _equal(mine, rank * size)


def _all_to_all(rank: int, size: int, device: torch.device) -> None:
    received = torch.empty(size, device=device)
    dist.all_to_all_single(received, torch.full((size,), float(rank), device=device))
    _equal(received - torch.arange(size, device=device), 0)


def _broadcast(rank: int, size: int, device: torch.device) -> None:
    tensor = torch.full((10,), float(rank), device=device)
    dist.broadcast(tensor, src=size - 1)
    _equal(tensor, size - 1)


def _point_to_point(rank: int, size: int, device: torch.device) -> None:
    """To the next rank and from the one before, in one batch, as pipeline stages do."""
    if size == 1:
        return
    sent, received = torch.full((10,), float(rank), device=device), torch.empty(10, device=device)
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, sent, (rank + 1) % size), dist.P2POp(dist.irecv, received, (rank - 1) % size)]
    )
    for work in works:
        work.wait()
    _equal(received, (rank - 1) % size)


def _objects(rank: int, size: int, device: torch.device) -> None:
    holder = [{"from": rank}]
    dist.broadcast_object_list(holder, src=0)
    gathered: list = [None] * size
    dist.all_gather_object(gathered, rank)
    if holder != [{"from": 0}] or gathered != list(range(size)):
        raise ArithmeticError(f"gave {holder} and {gathered}")


def _subgroups(rank: int, size: int, device: torch.device) -> None:
    """A group of one rank, one of every second, and a gloo group beside NCCL's, as Megatron creates them."""
    for members, backend in (([0], None), (list(range(0, size, 2)), None), (list(range(size)), "gloo")):
        group = dist.new_group(members, backend=backend)
        if rank in members:
            tensor = torch.ones(3, device="cpu" if backend == "gloo" else device)
            dist.all_reduce(tensor, group=group)
            _equal(tensor, len(members))
    dist.barrier()


COLLECTIVES = {
    "all_reduce": _all_reduce,
    "all_gather_into_tensor": _all_gather,
    "reduce_scatter_tensor": _reduce_scatter,
    "all_to_all_single": _all_to_all,
    "broadcast": _broadcast,
    "batch_isend_irecv": _point_to_point,
    "object collectives": _objects,
    "groups of some ranks": _subgroups,
}


def _all_reduce_rate(device: torch.device, nbytes: int, repeats: int = 5) -> float:
    """GB of the tensor per second of its all-reduce, the fastest of several."""
    tensor, fastest = torch.ones(nbytes // 4, device=device), float("inf")
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - start)
    return nbytes / fastest / 1e9


if __name__ == "__main__":
    main()
