"""Models, tokenizers and pairs small enough to create inside a test: random weights, a few hundred tokens."""

from pathlib import Path

WORDS = "red blue green paris rome seven three fast slow river stone bread".split()

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

# A BOS in the template itself, headers, and stripped contents, as in Llama 3.
HEADERS = """\
{{ bos_token }}{% for message in messages %}\
{{ '<|start_header|>' + message['role'] + '<|end_header|>\\n\\n' + message['content'] | trim + '<|eot|>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|start_header|>assistant<|end_header|>\\n\\n' }}{% endif %}"""

# No system role, `model` for the assistant, alternating roles, and stripped contents, as in Gemma.
TURNS = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}\
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate') }}{% endif %}\
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}\
{{ message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "turns": TURNS}
SPECIAL_TOKENS = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "headers": ["<|pad|>", "<|bos|>", "<|eot|>", "<|start_header|>", "<|end_header|>"],
    "turns": ["<pad>", "<bos>", "<end_of_turn>", "<start_of_turn>"],
}
CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "Write a short answer: why is the sky blue? Because air scatters blue light more than red light.",
    "user assistant system model You are a helpful assistant. Please rewrite the response above so that it is better.",
    "Two plus three is five, and seven minus four is three. 0 1 2 3 4 5 6 7 8 9",
]


def tiny_tokenizer(folder: str | Path, *, template: str = "chatml", vocab: int = 384) -> int:
    """Train a byte-level BPE on a few sentences and save it as a Hugging Face folder; returns its vocabulary size.

    ``template`` is one of :data:`TEMPLATES`. The first special token is for padding, and every byte has its own token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = SPECIAL_TOKENS[template]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        bos_token=special[1],
        eos_token=special[2],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATES[template]
    fast.save_pretrained(str(folder))
    return len(fast)


def tiny_llama(
    folder: str | Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 384,
    tied: bool = True,
    seed: int = 0,
) -> None:
    """Save a random Llama (fp32 safetensors) as a Hugging Face folder.

    Weights are larger than the usual initialisation, so that different prompts give visibly different log-probs.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).float().save_pretrained(str(folder))


def tiny_pair(number: int, name: str) -> dict[str, str]:
    """A preference pair whose three texts have 1 to 7 words and differ for each number."""
    say = [" ".join(WORDS[(number * k + j) % len(WORDS)] for j in range(1 + (number * k) % 7)) for k in (1, 5, 3)]
    return {"pair_id": name, "prompt": f"{number}: say {say[0]}", "chosen": say[1], "rejected": say[2] + " no"}


def perturb(hf: Path) -> None:
    """Move every weight of a Hugging Face folder a little."""
    import torch
    from safetensors.torch import load_file, save_file

    file, generator = hf / "model.safetensors", torch.Generator().manual_seed(3)
    save_file(
        {
            name: weight + 0.01 * torch.randn(weight.shape, generator=generator)
            for name, weight in load_file(file).items()
        },
        file,
        metadata={"format": "pt"},
    )
