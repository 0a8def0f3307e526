"""Hugging Face models from local folders, without downloads and without executing code from the folder."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from treg_megatron.distributed.launch import device_index, rank_info
from treg_megatron.errors import UserError
from treg_megatron.models.families.rotary import local_rope_settings, rope_settings
from treg_megatron.tokenizer.model_folder import model_folder
from treg_megatron.utils.files import hash_blocks, read_json
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


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The option of ``from_pretrained`` for a model's precision, which transformers 4.56 renamed."""
    import transformers

    major, minor = map(int, transformers.__version__.split(".")[:2])
    return {"dtype" if (major, minor) >= (4, 56) else "torch_dtype": dtype}


def set_attention(model: Any, name: str) -> None:
    """Choose a transformers model's attention function by its registered name, as transformers 4.54 and later do."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(name)
    else:
        model.config._attn_implementation = name


def load_causal_lm(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The causal language model of a folder in evaluation mode, with its own (eager) attention.

    Raises:
        UserError: it does not load, or lacks weights.
    """
    with heavy_imports():
        from transformers import AutoModelForCausalLM

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        # eager: the model's own attention; other implementations omit features (Gemma 2's soft-cap)
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=transformers_config(folder, **local),
            **dtype_option(dtype),
            use_safetensors=True,
            attn_implementation="eager",
            output_loading_info=True,
            **local,
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the model in {folder} does not load: {error}") from None
    if loading["missing_keys"]:  # transformers would fill them with random numbers
        raise UserError(f"{folder} lacks tensor {min(loading['missing_keys'])}, which its config.json calls for")
    return model.eval()


def transformers_config(folder: Path, **options: Any) -> Any:
    """config.json as transformers reads it, with the rotary settings of a file that transformers 5 wrote.

    Transformers 4 would pass over them, and compute with its default theta and without scaling.

    Args:
        options: of ``AutoConfig.from_pretrained``.

    Raises:
        UserError: the rotary settings contradict each other, or differ between layers of an architecture that has
            one for all.
    """
    from transformers import AutoConfig

    hf_config, config = read_json(folder / "config.json"), AutoConfig.from_pretrained(folder, **options)
    if hf_config.get("rope_parameters") or "rope_theta" in (hf_config.get("rope_scaling") or {}):
        by_layer = hasattr(config, "rope_local_base_freq")
        settings = rope_settings(hf_config, layers="full_attention" if by_layer else None)
        if by_layer:
            config.rope_local_base_freq = local_rope_settings(hf_config)["rope_local_base_freq"]
        config.rope_theta = settings.pop("rope_theta")
        config.rope_scaling = None if settings["rope_type"] == "default" else settings
    return config


def device_of(name: str) -> torch.device:
    """The device that a recipe's ``device`` names; of several GPUs, the one of this process' local rank.

    Raises:
        UserError: it does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{device_index(rank_info().local_rank)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name} cannot be used: {error}") from None
    return device
