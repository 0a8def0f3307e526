"""A random model of each supported architecture, small enough to build inside a test."""

from pathlib import Path

VOCAB = 389  # prime: padded at every tensor-parallel size

# Head sizes other than hidden / heads, windows shorter than the tests' sequences, soft-caps small enough to matter:
# every feature of an architecture must change the result.
SPECIAL = {
    "Llama": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "Mistral": {"head_dim": 24, "sliding_window": 6},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3},
    "Qwen3": {"head_dim": 24},
    "Gemma2": {
        "head_dim": 24,
        "sliding_window": 6,
        "query_pre_attn_scalar": 40,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
    },
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Qwen3Moe": {
        "head_dim": 24,
        "moe_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "use_sliding_window": True,
        "sliding_window": 6,
    },
    "Llama biased": {"attention_bias": True, "mlp_bias": True, "rope_theta": 500.0},
    "Phi3": {"partial_rotary_factor": 0.75, "sliding_window": 6},
    "Gemma3": {
        "head_dim": 24,
        "sliding_window": 6,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 40,
        "final_logit_softcapping": 5.0,
        "rope_theta": 5000.0,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
}
# Settings without parameters of their own.
VARIANTS = {
    "Llama linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "Llama dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "Qwen2 yarn": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 8.0}
    },
    "Qwen3 yarn": {
        "rope_theta": 100.0,
        "rope_scaling": {"type": "yarn", "factor": 3.0, "attention_factor": 1.7},
    },
    "Qwen3Moe unnormalised": SPECIAL["Qwen3Moe"] | {"norm_topk_prob": False},
}


def tiny_family(folder: Path, family: str, *, tied: bool, vocab: int = VOCAB, seed: int = 0) -> Path:
    """Save a random model (fp32 safetensors) as a Hugging Face folder; ``family`` is a key of :data:`SPECIAL` or
    :data:`VARIANTS`, whose first word is the architecture."""
    import torch
    import transformers

    name = family.split()[0]
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **(SPECIAL | VARIANTS)[family],
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(config).float()
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases, whose initial values have no effect
                parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return folder


def transformers_logprobs(hf: Path, tokens) -> "torch.Tensor":  # noqa: F821
    """log p(token t+1 | tokens up to t) by transformers in fp32, [batch, length - 1]."""
    import torch
    from transformers import AutoModelForCausalLM

    # transformers' SDPA attention ignores Gemma 2's soft-cap
    model = AutoModelForCausalLM.from_pretrained(hf, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(tokens).logits
    return logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
