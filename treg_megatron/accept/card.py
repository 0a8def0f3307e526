"""The card: what ran on which hardware with which versions, for people and for programs."""

import importlib.metadata
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import treg_megatron
from treg_megatron.accept.check import Machine, Result
from treg_megatron.utils.files import atomic_write

PACKAGES = (
    *("torch", "megatron-core", "nemo-toolkit", "transformer-engine", "apex", "lightning", "transformers"),
    *("nvidia-modelopt", "nvidia-resiliency-ext", "safetensors", "numpy"),
)


def write_card(folder: Path, machine: Machine, results: Sequence[Result], finished: bool) -> None:
    """Write acceptance.md and acceptance.json, each whole or as it was."""
    about = described(machine)
    record = {"about": about, "finished": finished, "checks": [vars(result) for result in results]}
    for name, text in (("json", json.dumps(record, indent=2) + "\n"), ("md", _markdown(about, results, finished))):
        with atomic_write(folder / f"acceptance.{name}") as partial:
            partial.write_text(text, encoding="utf-8")


def described(machine: Machine) -> dict[str, Any]:
    """Date, hardware and versions."""
    import torch

    cuda: dict[str, Any] = {}
    if machine.gpus:
        properties = torch.cuda.get_device_properties(0)
        cuda = {
            "gpu": f"{machine.gpus} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB",
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": time.strftime("%F"),
        "treg-megatron": treg_megatron.__version__,
        **cuda,
        "ranks": machine.ranks if machine.gpus else f"{machine.ranks} on the CPU",
        "cpu": f"{platform.machine()}, Python {platform.python_version()}",
        **versions,
    }


def _markdown(about: dict[str, Any], results: Sequence[Result], finished: bool) -> str:
    counts = {status: sum(result.status == status for result in results) for status in ("PASS", "FAIL", "not run")}
    lines = [
        "# Acceptance",
        "",
        ", ".join(f"{count} {status}" for status, count in counts.items()) + ("" if finished else "; still running"),
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in about.items()),
        "",
        "| check | question | answer | figures | seconds |",
        "|---|---|---|---|---:|",
    ]
    for result in results:
        figures = "; ".join(f"{name} {value:.4g} {unit}".rstrip() for name, value, unit in result.figures)
        answer = result.status + (f": {result.detail}" if result.detail else "")
        lines.append(f"| {result.name} | {result.question} | {_cell(answer)} | {figures} | {result.seconds:.0f} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
