"""A model, its tokenizer and pairs that are the same bit for bit on every machine, without a network.

The weights come from NumPy's RandomState, whose stream is frozen (NumPy Enhancement Proposal 19), and not from an
initialisation that changes between releases; the tokenizer is plain bytes.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from treg_megatron.models.families import family_of, in_model_order, model_fields, source_shape

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = "red blue green paris rome seven three fast slow river stone bread".split()
PAIRS = 16

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": 258,
    "pad_token_id": 256,
}


def write_model(folder: Path, config: dict = CONFIG) -> Path:
    """Write a Llama with random weights and a tokenizer of bytes as a Hugging Face folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    random, fields = np.random.RandomState(0), model_fields(config)
    tensors = {}
    for parameter, index in in_model_order(family_of(config), fields):
        for source in parameter.sources:
            shape = source_shape(source, fields)
            values = np.ones(shape) if len(shape) == 1 else 0.1 * random.standard_normal(shape)
            tensors[source.at(index)] = values.astype(np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)
    return folder


def write_pairs(path: Path, count: int = PAIRS) -> Path:
    """Write pairs of different lengths as JSON lines."""

    def text(number: int, step: int) -> str:
        return " ".join(WORDS[(number * step + i) % len(WORDS)] for i in range(1 + number * step % 7))

    pairs = [
        {"pair_id": f"p{i}", "prompt": f"{i}: say {text(i, 1)}", "chosen": text(i, 5), "rejected": text(i, 3) + " no"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[2],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
