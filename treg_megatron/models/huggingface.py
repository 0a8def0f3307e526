"""Hugging Face models from local folders, without downloads and without executing code from the folder."""

import hashlib
import json
from pathlib import Path

import torch

from treg_megatron.distributed.launch import rank_info
from treg_megatron.errors import UserError
from treg_megatron.utils.files import hash_blocks
from treg_megatron.utils.imports import heavy_imports

_FINGERPRINT_SAMPLES, _SAMPLE_BYTES = 64, 1 << 14


def model_identity(folder: str | Path) -> dict[str, str]:
    """The manifest entry of a model folder: its name, and a hash that changes with its weights.

    The hash covers config.json and, of every weights file, the size and 64 samples spread over it: training moves
    nearly every weight, and hashing 140 GB whole would take longer than many labelling jobs.
    """
    folder = model_folder(folder)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(json.dumps([path.name, size]).encode())
        offsets = (size * sample // _FINGERPRINT_SAMPLES for sample in range(_FINGERPRINT_SAMPLES))
        hash_blocks(digest, path, offsets, _SAMPLE_BYTES)
    return {"name": folder.resolve().name, "sha256": digest.hexdigest()}


def model_folder(folder: str | Path) -> Path:
    """``folder`` as a path.

    Raises:
        UserError: it has no config.json.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"model folder {folder} does not exist or has no config.json")
    return folder


def load_causal_lm(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The causal language model of a folder in evaluation mode, with its own (eager) attention.

    Raises:
        UserError: it does not load.
    """
    with heavy_imports():
        from transformers import AutoModelForCausalLM

    try:
        # eager: the model's own attention; other implementations omit features (Gemma 2's soft-cap)
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="eager",
        )
    except Exception as error:
        raise UserError(f"the model in {folder} does not load: {error}") from None
    return model.eval()


def device_of(name: str) -> torch.device:
    """The device that a recipe's ``device`` names; of several GPUs, the one of this process' local rank.

    Raises:
        UserError: it does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{rank_info().local_rank % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name} cannot be used: {error}") from None
    return device
