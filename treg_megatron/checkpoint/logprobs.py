"""Per-token log-prob comparison of a Megatron checkpoint with transformers on a Hugging Face folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from treg_megatron.checkpoint.layout import find_checkpoint
from treg_megatron.checkpoint.policy import load_policy
from treg_megatron.errors import UserError
from treg_megatron.models.huggingface import load_causal_lm
from treg_megatron.utils.imports import heavy_imports

# Largest accepted difference in nats: both sides compute in fp32, with different rounding in every layer.
TOLERANCE = 1e-4

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome. What, then, is the capital of Spain?",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
    "Die Katze sitzt auf der Matte. 猫がマットの上に座っている。 Il gatto è seduto sul tappeto.",
)


@dataclass(frozen=True)
class Difference:
    """Number of tokens scored by both models, and the largest absolute difference of their log-probs, in nats."""

    tokens: int
    largest: float


def logprob_difference(checkpoint: Path, hf: Path, texts: Sequence[str]) -> Difference:
    """Compare log p(token | tokens before it) over ``texts``, both models in fp32, one at a time in memory.

    Raises:
        UserError: the checkpoint is incomplete, the folder or its tokenizer does not load, or a text has fewer than
            two tokens.
    """
    ids = [_ids(hf, text) for text in texts]
    found = torch.cat(_megatron_logprobs(find_checkpoint(checkpoint), ids))
    expected = torch.cat(_transformers_logprobs(hf, ids))
    return Difference(len(expected), (found - expected).abs().max().item())


def _ids(hf: Path, text: str) -> torch.Tensor:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(hf, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"the tokenizer of {hf} does not load: {error}") from None
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    if len(ids) < 2:
        raise UserError(f"the text {text!r} has {len(ids)} tokens: a log-prob needs at least two")
    return ids


def _megatron_logprobs(checkpoint: Path, ids: list[torch.Tensor]) -> list[torch.Tensor]:
    if not torch.cuda.is_available():
        from treg_megatron.distributed.cpu_redirect import use_cpu

        use_cpu()
    with heavy_imports():
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        from treg_megatron.models.policy import data_step, forward_step
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)  # modules need Megatron's RNG state although all weights are loaded
        policy = load_policy(checkpoint)
        with torch.no_grad():
            return [forward_step(policy, data_step(iter([_batch(x)]))).cpu() for x in ids]
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _batch(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch of one sequence that scores every token but the first."""
    return {
        "tokens": ids[None],
        "position_ids": torch.arange(len(ids))[None],
        "rows": torch.arange(len(ids) - 1),
        "targets": ids[1:],
    }


def _transformers_logprobs(hf: Path, ids: list[torch.Tensor]) -> list[torch.Tensor]:
    model = load_causal_lm(hf, torch.float32)
    with torch.no_grad():
        logits = [model(x[None]).logits[0, :-1] for x in ids]
    return [x.log_softmax(-1).gather(-1, i[1:, None]).squeeze(-1) for x, i in zip(logits, ids, strict=True)]
