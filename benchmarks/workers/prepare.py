"""Shared inputs of train_step.py: weights, tokenizer, pairs that fit; for our trainer also labels and checkpoint."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from treg_megatron.checkpoint.from_hf import import_checkpoint
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.data.pairs import read_pairs
from treg_megatron.data.streams import open_streams
from treg_megatron.labelling.indexing import index
from treg_megatron.labelling.job import label
from treg_megatron.tokenizer.chat import load_tokenizer


def main(folder: Path, model: str, tokenizer: str, pairs: Path, max_length: int) -> None:
    """Write all inputs into ``folder`` and print a one-line summary.

    Args:
        model: Hugging Face folder; empty for a random Llama with the tokenizer of folder ``tokenizer``.
        pairs: preference pairs; those with a sequence longer than ``max_length`` tokens are left out.
    """
    hf = Path(model) if model else random_llama(folder / "hf", tokenizer)
    encoder = load_tokenizer(hf)
    kept = []
    for pair in read_pairs(pairs):
        lengths = [
            len(encoder.encode_prompt(pair.messages)) + len(encoder.encode_response(pair.messages, response))
            for response in (pair.chosen, pair.rejected)
        ]
        if max(lengths) <= max_length:
            kept.append(
                {
                    "pair_id": pair.pair_id,
                    "prompt": [{"role": m.role, "content": m.content} for m in pair.messages],
                    "chosen": [{"role": "assistant", "content": pair.chosen}],
                    "rejected": [{"role": "assistant", "content": pair.rejected}],
                }
            )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    (folder / "model.txt").write_text(str(hf))
    recipe = load_recipe(
        "recipes/tiny.yaml",
        [f"run={folder}", f"model.hf={hf}", f"label.pairs={folder}/pairs.jsonl", f"label.max_length={max_length}"],
    )
    label(section(recipe, "label"))
    index(section(recipe, "index"))
    import_checkpoint(hf, folder / "megatron")
    lengths = open_streams(folder / "streams" / "train").sequence_lengths
    parameters = (
        sum(p.numel() for p in LlamaForCausalLM(AutoConfig.from_pretrained(hf)).parameters()) if not model else 0
    )
    print(
        f"{len(lengths)} pairs, {lengths.mean():.0f} tokens per sequence (longest {lengths.max()}), model {hf}"
        + (f", {parameters / 1e6:.0f}M parameters" if parameters else "")
    )


def random_llama(folder: Path, tokenizer: str) -> Path:
    """Write a random Llama with 10 layers of width 512: 56.6M parameters with a tied vocabulary of 49,152."""
    encoder = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(encoder),
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=10,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
    ).save_pretrained(folder)
    encoder.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]), int(sys.argv[5]))
