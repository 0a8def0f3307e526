"""Hugging Face folders of random tensors, without transformers."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from treg_megatron.models.families import family_of, in_model_order, model_fields, source_shape

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 101,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "max_position_embeddings": 64,
}


def random_tensors(config: dict, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    fields = model_fields(config)
    generator = torch.Generator().manual_seed(0)
    return {
        source.at(index): torch.randn(source_shape(source, fields), generator=generator).to(dtype)
        for parameter, index in in_model_order(family_of(config), fields)
        for source in parameter.sources
    }


def hf_folder(folder: Path, config: dict = CONFIG, dtype: torch.dtype = torch.bfloat16, shards: int = 1) -> Path:
    """Write a random model as transformers saves it, in one file or in several with an index."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"kept": "as it is"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    tensors = random_tensors(config, dtype)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: tensors[n] for n in names[shard::shards]}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[shard::shards], name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"
            for name in file.keys():
                assert name not in tensors
                tensors[name] = file.get_tensor(name)
    return tensors
