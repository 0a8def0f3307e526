"""Check of a job's nodes before it starts: packages, files, disk space for checkpoints, devices and collectives."""

import importlib.metadata
import json
import platform
import secrets
import shutil
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from treg_megatron.checkpoint.layout import IDENTITY, read_metadata
from treg_megatron.config.recipe import section
from treg_megatron.data.blend import parse_blend
from treg_megatron.data.indexed import ends_of
from treg_megatron.distributed.launch import (
    RankInfo,
    connect_store,
    destroy_process_group,
    init_process_group,
    node_name,
    rank_info,
    require_device,
    take_device,
)
from treg_megatron.errors import UserError
from treg_megatron.preflight.costs import checkpoint_bytes
from treg_megatron.utils.files import bytes_in

ANSWER_SECONDS = 120
ALL_REDUCE_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}


def check(recipe: DictConfig) -> None:
    """Check the nodes of this process's job; every rank must call it.

    Raises:
        UserError: on every rank, if a node fails the check; the message names the node.
    """
    ranks = rank_info()
    require_device(section(recipe, "cluster").device)
    inputs, output = files_of_training(recipe)
    store = connect_store(ranks)
    store.set_timeout(timedelta(seconds=ANSWER_SECONDS))
    if ranks.rank == 0:
        store.set("probe", write_probe(output))
    answer = store.get("probe").decode()
    if answer.startswith("/"):
        if ranks.local_rank == 0:
            store.set(f"name {ranks.rank}", node_name())
            store.set(f"node {ranks.rank}", json.dumps({"node": node_name(), **describe_node(inputs, Path(answer))}))
        if ranks.rank == 0:
            store.set("verdict", verdict(_nodes(store, ranks), bytes_needed(recipe), output))
            Path(answer).unlink()
        answer = store.get("verdict").decode()
    _leave_after(store, ranks, "read")
    if answer:
        raise UserError(answer)
    devices(ranks, store)


def write_probe(output: Path) -> str:
    """Create a probe file in the run's output folder; return its path, or an error message if that fails."""
    probe = output / f".node_check-{secrets.token_hex(8)}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        return f"{node_name()} cannot write {output} (train.output): {error.strerror}"
    return str(probe)


def _nodes(store, ranks: RankInfo) -> list[dict[str, Any]]:
    """The report of each node, see :func:`describe_node`; a node that did not answer is marked as silent."""
    nodes = []
    for rank in range(0, ranks.size, ranks.local_size):
        try:
            nodes.append(json.loads(store.get(f"node {rank}")))
        except RuntimeError:
            name = store.get(f"name {rank}").decode() if store.check([f"name {rank}"]) else f"the node of rank {rank}"
            nodes.append({"node": name, "silent": True})
    return nodes


def files_of_training(recipe: DictConfig) -> tuple[dict[str, Path], Path]:
    """The input files that every node must see, by the recipe key that names them, and the output folder."""
    model, data, run = (section(recipe, name) for name in ("model", "data", "train"))
    inputs = {
        f"model.checkpoint={model.checkpoint}": Path(model.checkpoint) / IDENTITY,
        f"model.hf={model.hf}": Path(model.hf) / "config.json",
    }
    for key, written in (("data.train", data.train), ("data.validation", data.validation)):
        for prefix in parse_blend(written)[0] if written else ():
            inputs[f"{key}={prefix}"] = Path(f"{prefix}.manifest.json")
    return inputs, Path(run.output).absolute()


def bytes_needed(recipe: DictConfig) -> int:
    """Bytes of disk space that the run's checkpoints still need.

    Counts one more than are kept, because the oldest is deleted only once the newest is complete.
    """
    model, run = section(recipe, "model"), section(recipe, "train")
    source = Path(model.checkpoint)
    if not (source / IDENTITY).is_file():
        return 0  # training will refuse to start
    itemsize = 4 if read_metadata(source).dtype == "float32" else 2
    parameters = bytes_in(source) // itemsize
    written = bytes_in(Path(run.output) / "checkpoints")
    return max(checkpoint_bytes(parameters, 0, run.precision) * (run.save_total_limit + 1) - written, 0)


def describe_node(inputs: dict[str, Path], probe: Path) -> dict[str, Any]:
    """Installed packages, digests of the visible input files, whether the probe file is visible, and free bytes."""
    packages = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "packages": {"python": platform.python_version(), **packages},
        "inputs": {what: ends_of(path) if path.is_file() else None for what, path in inputs.items()},
        "probe": probe.is_file(),
        "free": shutil.disk_usage(probe.parent).free if probe.parent.is_dir() else 0,
    }


def verdict(nodes: list[dict[str, Any]], needed: int, output: Path) -> str:
    """One line on what is wrong, or an empty string. A node that differs from the majority counts as wrong.

    Args:
        nodes: their reports, see :func:`describe_node`.
        needed: bytes that the checkpoints need in ``output``.
    """
    wrong = [f"{node['node']} did not answer within {ANSWER_SECONDS} s" for node in nodes if node.get("silent")]
    nodes = [node for node in nodes if not node.get("silent")]
    for node in nodes:
        if not node["probe"]:
            wrong.append(
                f"{node['node']} does not see {output} (train.output) as {nodes[0]['node']} does: it must be on "
                "storage that all nodes share"
            )
        elif node["free"] < needed:
            wrong.append(
                f"{node['node']} has {node['free'] / 1e9:.1f} GB free in {output} (train.output), the checkpoints "
                f"need {needed / 1e9:.1f} GB"
            )
    for what, has, _, name in _differences(nodes, "inputs"):
        wrong.append(
            f"{name} does not see {what}" if has is None else f"{name} sees a different file than the others as {what}"
        )
    for what, has, usual, name in _differences(nodes, "packages"):
        wrong.append(f"{name} has {what} {has or 'not installed'}, the others have {usual or 'it not installed'}")
    if not wrong:
        return ""
    return (
        "; ".join(wrong[:4])
        + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        + ". Fix the node or exclude it: sbatch --exclude"
    )


def _differences(nodes: list[dict[str, Any]], kind: str) -> list[tuple[str, str | None, str | None, str]]:
    """(what, found, usual, node) wherever a node differs from the majority, or no node sees an input."""
    found = []
    for what in sorted({what for node in nodes for what in node[kind]}):
        counts = Counter(node[kind].get(what) for node in nodes)
        usual = max(counts, key=lambda value: (counts[value], value is not None))  # on a tie, the node that has it
        found += [
            (what, node[kind].get(what), usual, node["node"])
            for node in nodes
            if node[kind].get(what) != usual or (kind == "inputs" and usual is None)
        ]
    return found


def devices(ranks: RankInfo, store: Any) -> None:
    """Run a matrix product on every device and an all-reduce over all ranks; rank 0 prints the bandwidth.

    Raises:
        UserError: on every rank, if a device gives a wrong result or an error.
    """
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    # over the store: a broken GPU cannot take part in a collective
    store.set(f"device of {ranks.rank}", json.dumps((node_name(), _computes(ranks, kind))))
    if ranks.rank == 0:
        answers = [json.loads(store.get(f"device of {rank}")) for rank in range(ranks.size)]
        store.set("bad devices", ", ".join(sorted({node for node, correct in answers if not correct})))
    bad = store.get("bad devices").decode()
    _leave_after(store, ranks, "read devices")
    if bad:
        raise UserError(f"the devices of {bad} give wrong results or errors: exclude the node, sbatch --exclude")
    init_process_group(ranks, ANSWER_SECONDS, store)
    seconds = _all_reduce_seconds(kind)
    size = ALL_REDUCE_BYTES[kind]
    on_wire = size * 2 * (ranks.size - 1) / ranks.size  # bytes that each rank of a ring sends
    if ranks.rank == 0:
        print(
            f"nodes: {ranks.nodes} with {ranks.local_size} ranks each, the same packages, all folders visible; "
            f"all-reduce of {size >> 20} MiB over all ranks: {on_wire / seconds / 1e9:.2f} GB/s",
            flush=True,
        )
    destroy_process_group()


def _computes(ranks: RankInfo, kind: str) -> bool:
    """Whether this process's device multiplies matrices without an error."""
    import torch

    try:
        take_device(ranks)
        ones = torch.ones(512, 512, device=kind)
        return bool((ones @ ones == 512).all())
    except (RuntimeError, UserError):
        return False


def _leave_after(store: Any, ranks: RankInfo, read: str) -> None:
    """Count this rank under the key ``read``; rank 0, which serves the store, waits for all others."""
    store.add(read, 1)
    while ranks.rank == 0 and store.add(read, 0) < ranks.size:
        time.sleep(0.01)


def _all_reduce_seconds(kind: str) -> float:
    import torch

    tensor = torch.ones(ALL_REDUCE_BYTES[kind] // 4, device=kind)
    best = float("inf")
    for _ in range(5):
        torch.distributed.barrier()
        if kind == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.distributed.all_reduce(tensor)
        if kind == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best
