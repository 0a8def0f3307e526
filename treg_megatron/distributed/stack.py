"""What the installed stack offers, said aloud once, and refused early where it would fail late."""

import importlib.metadata
import importlib.util

import torch

from treg_megatron.errors import UserError

TESTED = {"megatron-core": "0.15", "nemo-toolkit": "2.7"}


def require_stack() -> None:
    """Refuse library versions that are known not to train.

    Raises:
        UserError: another megatron-core or NeMo line than the tested one, or a package ``apex`` that is not NVIDIA's.
    """
    for package, line in TESTED.items():
        version = _version(package)
        if version is None:
            raise UserError(f"{package} is not installed: pip install -c constraints.txt -e .")
        if not version.startswith(line + "."):
            raise UserError(
                f"{package} {version} is installed, {line}.x is what this release was tested with: "
                f"pip install -c constraints.txt -e ."
            )
    if importlib.util.find_spec("apex") and not importlib.util.find_spec("apex.optimizers"):
        raise UserError("the installed package apex is PyPI's web toolkit, not NVIDIA's Apex: pip uninstall apex")


def describe_stack() -> str:
    """One line: what computes, what communicates, what steps the optimizer."""
    cuda = torch.cuda.is_available()
    engine, apex = _version("transformer-engine"), importlib.util.find_spec("apex") is not None
    device = torch.cuda.get_device_name(0) if cuda else f"CPU, {torch.get_num_threads()} threads a rank"
    adam = "Transformer Engine" if engine else "Apex" if apex else "torch"
    return " | ".join(
        (
            f"torch {torch.__version__} on {device}",
            f"megatron-core {_version('megatron-core')}, NeMo {_version('nemo-toolkit')}",
            f"layers: {'Transformer Engine ' + engine if engine else 'torch (Transformer Engine not installed)'}",
            f"Adam: {adam}",
            f"Apex: {'yes' if apex else 'not installed'}",
            f"collectives: {'NCCL' if cuda else 'gloo'}",
        )
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
