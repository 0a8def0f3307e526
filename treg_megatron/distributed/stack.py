"""Version check and one-line summary of the installed stack (torch, megatron-core, NeMo, TE, Apex)."""

import importlib.metadata
import importlib.util

import torch

from treg_megatron.errors import UserError

TESTED = {"megatron-core": "0.15", "nemo-toolkit": "2.7"}


def require_stack() -> None:
    """Reject library versions that training does not support, before anything is built from them.

    Raises:
        UserError: megatron-core or NeMo is missing or not of the tested release line (:data:`TESTED`), or the installed
            package ``apex`` is not NVIDIA's.
    """
    for package, line in TESTED.items():
        version = _version(package)
        if version is None:
            raise UserError(f"{package} is not installed: pip install -c constraints.txt -e .")
        if not version.startswith(line + "."):
            raise UserError(
                f"{package} {version} is installed, but this release was tested with {line}.x: "
                f"pip install -c constraints.txt -e ."
            )
    if importlib.util.find_spec("apex") and not importlib.util.find_spec("apex.optimizers"):
        raise UserError("the installed package apex is PyPI's web toolkit, not NVIDIA's Apex: pip uninstall apex")


def describe_stack() -> str:
    """One line for the log: device, library versions, layer and Adam implementations, collectives backend."""
    cuda = torch.cuda.is_available()
    # hidden on CPUs, see cpu_redirect
    engine = _version("transformer-engine") if importlib.util.find_spec("transformer_engine") else None
    apex = importlib.util.find_spec("apex") is not None
    device = torch.cuda.get_device_name(0) if cuda else f"CPU, {torch.get_num_threads()} threads per rank"
    adam = "Transformer Engine" if engine else "Apex" if apex else "torch"
    return " | ".join(
        (
            f"torch {torch.__version__} on {device}",
            f"megatron-core {_version('megatron-core')}, NeMo {_version('nemo-toolkit')}",
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
