"""The sets of NeMo and megatron-core that training supports, and a one-line summary of what is installed."""

import importlib.metadata
import importlib.util
from dataclasses import dataclass

import torch

from treg_megatron.errors import UserError


@dataclass(frozen=True)
class SupportedSet:
    """Release lines that are tested together.

    Attributes:
        source: where the set comes from.
        nemo: release line of nemo-toolkit.
        megatron_core: release line of megatron-core.
        constraints: the file with exact versions of the set, in the repository.
    """

    source: str
    nemo: str
    megatron_core: str
    constraints: str


SUPPORTED = (
    SupportedSet("constraints.txt", "2.7", "0.15", "constraints.txt"),
    SupportedSet("nvcr.io/nvidia/nemo:25.11", "2.6", "0.15", "constraints/25.11.txt"),
    SupportedSet("nvcr.io/nvidia/nemo:26.02", "2.7", "0.16", "constraints/26.02.txt"),
)
INSTALL = "use the container nvcr.io/nvidia/nemo:25.11 or 26.02, or pip install -c constraints.txt -e ."


def require_stack() -> SupportedSet:
    """The set that is installed; anything else is refused before a model is built from it.

    Raises:
        UserError: megatron-core or NeMo is missing, the two are of none of the sets in :data:`SUPPORTED`, or the
            installed package ``apex`` is not NVIDIA's.
    """
    nemo, megatron_core = _version("nemo-toolkit"), _version("megatron-core")
    for package, version in (("nemo-toolkit", nemo), ("megatron-core", megatron_core)):
        if version is None:
            raise UserError(f"{package} is not installed: {INSTALL}")
    found = supported_set(nemo, megatron_core)
    if found is None:
        pairs = ", ".join(f"{s.nemo} with {s.megatron_core}" for s in SUPPORTED)
        raise UserError(
            f"NeMo {nemo} with megatron-core {megatron_core} is not supported (supported are {pairs}): {INSTALL}"
        )
    if importlib.util.find_spec("apex") and not importlib.util.find_spec("apex.optimizers"):
        raise UserError("the installed package apex is PyPI's web toolkit, not NVIDIA's Apex: pip uninstall apex")
    return found


def supported_set(nemo: str, megatron_core: str) -> SupportedSet | None:
    """The set that two versions belong to: all releases of a line, with the suffixes of NVIDIA's builds."""
    for one in SUPPORTED:
        if nemo.startswith(f"{one.nemo}.") and megatron_core.startswith(f"{one.megatron_core}."):
            return one
    return None


def describe_stack(installed: SupportedSet) -> str:
    """One line for the log: device, set and versions, layer and Adam implementations, collectives backend."""
    cuda = torch.cuda.is_available()
    # hidden on CPUs, see cpu_redirect
    engine = _version("transformer-engine") if importlib.util.find_spec("transformer_engine") else None
    apex = importlib.util.find_spec("apex") is not None
    device = torch.cuda.get_device_name(0) if cuda else f"CPU, {torch.get_num_threads()} threads per rank"
    adam = "Transformer Engine" if engine else "Apex" if apex else "torch"
    versions = f"NeMo {_version('nemo-toolkit')}, megatron-core {_version('megatron-core')}"
    return " | ".join(
        (
            f"torch {torch.__version__} on {device}",
            f"{versions} (the set of {installed.source})",
            f"layers: {'Transformer Engine ' + engine if engine else 'torch (no Transformer Engine)'}",
            f"Adam: {adam}",
            f"Apex: {'yes' if apex else 'no'}",
            f"collectives: {'NCCL' if cuda else 'gloo'}",
        )
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
