"""Hugging Face folder of a word-level tokenizer and a randomly initialised Llama of about a million parameters."""

import functools
from pathlib import Path

from studies.miniature.world import CONNECTORS, DIGITS, FILLERS, LETTERS, OPERATIONS, VERBS

END = "<end>"
SPECIAL = ("<pad>", "<user>", "<model>", END)
REQUEST = (":", "make", "it", "better", "worse", "User:")
CHAT_TEMPLATE = """\
{% for message in messages %}{% if message['role'] == 'user' %}{{ '<user> ' + message['content'] + ' ' }}\
{% else %}{{ '<model> ' + message['content'] + '<end> ' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<model> ' }}{% endif %}"""


@functools.cache
def vocabulary() -> list[str]:
    """All tokens in the order of their ids, special tokens first."""
    words = [*SPECIAL, *REQUEST, *CONNECTORS, *VERBS, *FILLERS, *DIGITS, *LETTERS]
    for name, operation in OPERATIONS.items():
        words += [name, *operation.arguments, *operation.items]
        words += [token for argument in operation.arguments for token in operation.alphabet(argument)]
    return list(dict.fromkeys(words))


def write_model(folder: Path, *, layers: int, hidden: int, ffn: int, heads: int, positions: int, seed: int) -> None:
    """Write the tokenizer and random fp32 weights.

    Args:
        folder: the Hugging Face folder to write.
        positions: longest sequence.
        seed: of the weights.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = vocabulary()
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<pad>",
        eos_token=END,
        additional_special_tokens=["<user>", "<model>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder))
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.index(END),
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).float()
    model.save_pretrained(str(folder))
