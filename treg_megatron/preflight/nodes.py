"""Check of a job's nodes before it starts: packages, files, room for checkpoints, devices and collectives."""

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

from treg_megatron.checkpoint.layout import IDENTITY, read_identity
from treg_megatron.config.recipe import section
from treg_megatron.data.blend import parse_blend
from treg_megatron.data.indexed import ends_of
from treg_megatron.distributed.launch import World, connect, join, leave, node_name, world
from treg_megatron.errors import UserError
from treg_megatron.preflight.costs import checkpoint_bytes
from treg_megatron.utils.files import bytes_in

ANSWER_SECONDS = 120
ALL_REDUCE_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}


def check(recipe: DictConfig) -> None:
    """Check the nodes of this process' job; every rank calls it.

    Raises:
        UserError: on every rank; the message names the node.
    """
    ranks = world()
    inputs, output = files_of_training(recipe)
    store = connect(ranks)
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
    store.add("read", 1)
    while ranks.rank == 0 and store.add("read", 0) < ranks.size:  # rank 0 takes the store with it
        time.sleep(0.01)
    if answer:
        raise UserError(answer)
    devices(ranks, store)


def write_probe(output: Path) -> str:
    """The path of a new file in the folder that the run writes to, or what is wrong with that folder."""
    probe = output / f".node_check-{secrets.token_hex(8)}"
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        return f"{node_name()} cannot write {output} (train.output): {error.strerror}"
    return str(probe)


def _nodes(store, ranks: World) -> list[dict[str, Any]]:
    """What each node says of itself."""
    nodes = []
    for rank in range(0, ranks.size, ranks.local_size):
        try:
            nodes.append(json.loads(store.get(f"node {rank}")))
        except RuntimeError:
            name = store.get(f"name {rank}").decode() if store.check([f"name {rank}"]) else f"the node of rank {rank}"
            nodes.append({"node": name, "silent": True})
    return nodes


def files_of_training(recipe: DictConfig) -> tuple[dict[str, Path], Path]:
    """The files that every node must see, by the keys that name them, and the folder that is written."""
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
    """Room that the run's checkpoints still need, one more than are kept: the oldest goes when the newest is whole."""
    model, run = section(recipe, "model"), section(recipe, "train")
    source = Path(model.checkpoint)
    if not (source / IDENTITY).is_file():
        return 0  # it is about to be refused
    itemsize = 4 if read_identity(source).dtype == "float32" else 2
    parameters = bytes_in(source) // itemsize
    written = bytes_in(Path(run.output) / "checkpoints")
    return max(checkpoint_bytes(parameters, 0, run.precision) * (run.save_total_limit + 1) - written, 0)


def describe_node(inputs: dict[str, Path], probe: Path) -> dict[str, Any]:
    """What this node has and sees."""
    packages = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {
        "packages": {"python": platform.python_version(), **packages},
        "inputs": {what: ends_of(path) if path.is_file() else None for what, path in inputs.items()},
        "probe": probe.is_file(),
        "free": shutil.disk_usage(probe.parent).free if probe.parent.is_dir() else 0,
    }


def verdict(nodes: list[dict[str, Any]], needed: int, output: Path) -> str:
    """One line on what is wrong, or nothing; what most nodes have counts as right."""
    wrong = [f"{node['node']} did not answer within {ANSWER_SECONDS} s" for node in nodes if node.get("silent")]
    nodes = [node for node in nodes if not node.get("silent")]
    for node in nodes:
        if not node["probe"]:
            wrong.append(
                f"{node['node']} does not see {output} (train.output) as {nodes[0]['node']} does: it must be on a "
                "disk that all nodes share"
            )
        elif node["free"] < needed:
            wrong.append(
                f"{node['node']} has {node['free'] / 1e9:.1f} GB free in {output} (train.output), the checkpoints "
                f"take {needed / 1e9:.1f} GB"
            )
    for what, has, _, name in _differences(nodes, "inputs"):
        wrong.append(
            f"{name} does not see {what}" if has is None else f"{name} sees another file than others as {what}"
        )
    for what, has, usual, name in _differences(nodes, "packages"):
        wrong.append(f"{name} has {what} {has or 'not installed'}, others have {usual or 'it not installed'}")
    if not wrong:
        return ""
    return (
        "; ".join(wrong[:4])
        + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        + ". Mend it, or leave the node out: sbatch --exclude"
    )


def _differences(nodes: list[dict[str, Any]], kind: str) -> list[tuple[str, str | None, str | None, str]]:
    """(what, found, usual, node) where a node differs from most, or where an input is nowhere."""
    found = []
    for what in sorted({what for node in nodes for what in node[kind]}):
        usual = Counter(node[kind].get(what) for node in nodes).most_common(1)[0][0]
        found += [
            (what, node[kind].get(what), usual, node["node"])
            for node in nodes
            if node[kind].get(what) != usual or (kind == "inputs" and usual is None)
        ]
    return found


def devices(ranks: World, store: Any) -> None:
    """Let every device compute, and all ranks reduce a tensor together; print how fast.

    Raises:
        UserError: on every rank, a device that computes wrongly or not at all.
    """
    import torch

    join(ranks, ANSWER_SECONDS, store)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        ones = torch.ones(512, 512, device=kind)
        well = bool((ones @ ones == 512).all())
    except RuntimeError:
        well = False
    answers: list = [None] * ranks.size
    torch.distributed.all_gather_object(answers, (node_name(), well))
    if bad := sorted({node for node, well in answers if not well}):
        raise UserError(
            f"devices of {', '.join(bad)} compute wrongly or not at all: leave the node out, sbatch --exclude"
        )
    seconds = _all_reduce_seconds(kind)
    size = ALL_REDUCE_BYTES[kind]
    on_wire = size * 2 * (ranks.size - 1) / ranks.size  # what a ring sends and receives
    if ranks.rank == 0:
        print(
            f"nodes: {ranks.nodes} with {ranks.local_size} ranks each, the same packages, all folders visible; "
            f"all-reduce of {size >> 20} MiB over all ranks: {on_wire / seconds / 1e9:.2f} GB/s",
            flush=True,
        )
    leave()


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
