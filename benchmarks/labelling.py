"""Speed of labelling compared with scoring one sequence at a time, and an ablation of its optimisations.

    python benchmarks/labelling.py --model HF_FOLDER [--pairs PAIRS.jsonl] [--prompt-pair few_shot] [--count 16]

Plain: Hugging Face, one sequence at a time, logits at response positions only, each of a response's three contexts
computed in full. Ours: the engine of tools/label_tokens.py. Both score the same sequences in the same run, alternating,
and the figure is the ratio of their best times; tokens/s count all tokens of all three contexts for both. Then each
optimisation is switched off once, one at a time.

`computed` is the number of tokens that remain if shared prefixes are computed once. It bounds the gain from sharing,
provided that a matrix product takes the same time per token.
"""

import argparse
import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from treg_megatron.data.alignment import score_positions
from treg_megatron.data.pairs import read_pairs
from treg_megatron.labelling.prompt_pair import load_prompt_pair
from treg_megatron.labelling.scoring import ScoredSequence, shared_prefixes
from treg_megatron.labelling.scoring.huggingface import HuggingFaceScorer
from treg_megatron.tokenizer.chat import load_tokenizer
from treg_megatron.utils import entry

ROOT = Path(__file__).resolve().parents[1]
LARGEST_DIFFERENCE = {"float32": 1e-4, "bfloat16": float("inf")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder of the reference model")
    parser.add_argument("--pairs", default=ROOT / "demo" / "pairs" / "train.jsonl", help="preference pairs")
    parser.add_argument("--prompt-pair", default="few_shot", help="better/worse prompt pair")
    parser.add_argument("--count", type=int, default=16, help="pairs to score, spread evenly over the file")
    parser.add_argument("--max-length", type=int, default=2048, help="longer sequences are left out")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens per forward pass of ours")
    parser.add_argument("--repeat", type=int, default=2, help="runs of plain and ours; the fastest counts")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    arguments = parser.parse_args()
    sequences = scored_sequences(arguments)
    tokens = sum(sequence.length for sequence in sequences)
    print(
        f"{len(sequences) // 6} pairs of {arguments.pairs}, prompt pair {arguments.prompt_pair}: {len(sequences)} "
        f"sequences, {tokens} tokens, {min(s.length for s in sequences)} to {max(s.length for s in sequences)} each; "
        f"{torch.get_num_threads()} threads"
    )
    figures = [figure(arguments, dtype, sequences, tokens) for dtype in arguments.dtypes]
    print(*figures, sep="\n")


def scored_sequences(arguments: argparse.Namespace) -> list[ScoredSequence]:
    """Six sequences per pair: chosen and rejected response after the prompts x, x_better and x_worse."""
    tokenizer, prompts = load_tokenizer(arguments.model), load_prompt_pair(arguments.prompt_pair)
    pairs = list(read_pairs(arguments.pairs))
    sequences = []
    for pair in pairs[:: max(1, len(pairs) // arguments.count)][: arguments.count]:
        six = []
        for text in (pair.chosen, pair.rejected):
            response = tokenizer.encode_response(pair.messages, text)
            for messages in (pair.messages, prompts.better(pair.messages, text), prompts.worse(pair.messages, text)):
                six.append(ScoredSequence(tokenizer.encode_prompt(messages), response))
        if max(sequence.length for sequence in six) <= arguments.max_length:
            sequences += six
    return sequences


def figure(arguments: argparse.Namespace, dtype: str, sequences: list[ScoredSequence], tokens: int) -> str:
    """Time all variants in one precision and print them; return the figure's line."""
    plain = plain_scorer(arguments.model, dtype)
    ours = HuggingFaceScorer(arguments.model, dtype, "cpu", arguments.batch_tokens)
    variants: dict[str, Callable[[], list[np.ndarray]]] = {
        "plain": lambda: [plain(sequence) for sequence in sequences],
        "ours": lambda: ours.score(sequences),
        "ours, nothing shared": lambda: without_sharing(ours, sequences),
        "ours, one pair in a pass": lambda: list(
            itertools.chain.from_iterable(ours.score(sequences[i : i + 6]) for i in range(0, len(sequences), 6))
        ),
        "ours, one sequence in a pass": lambda: [ours.score([sequence])[0] for sequence in sequences],
        "plain, logits of every token": lambda: [plain(sequence, True) for sequence in sequences],
    }
    plain(sequences[0]), ours.score(sequences[:1])  # warm-up: the first call of a process sets up kernels
    seconds, values = dict.fromkeys(variants, float("inf")), {}
    for name in ["plain", "ours"] * (arguments.repeat - 1) + list(variants):
        start = time.perf_counter()
        values[name] = variants[name]()
        seconds[name] = min(seconds[name], time.perf_counter() - start)
    difference = max(np.abs(a - b).max() for a, b in zip(values["plain"], values["ours"]))
    print(
        f"\n{dtype}: {computed_tokens(sequences, ours):,} of {tokens:,} tokens computed; "
        f"largest difference of a log-prob {difference:.1e}"
    )
    assert difference < LARGEST_DIFFERENCE[dtype]
    for name in variants:
        print(
            f"  {name:30} {seconds[name]:7.2f} s {tokens / seconds[name]:9,.0f} tokens/s "
            f"{seconds['plain'] / seconds[name]:6.2f} x plain"
        )
    short = {"float32": "fp32", "bfloat16": "bf16"}[dtype]
    return f"figure label_vs_plain_{short} {seconds['plain'] / seconds['ours']:.2f} ratio"


def plain_scorer(folder: str, dtype: str) -> Callable[[ScoredSequence], np.ndarray]:
    """The baseline: a function that returns the fp32 log-probs [response tokens] of one sequence."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True).eval()

    @torch.inference_mode()
    def score(sequence: ScoredSequence, all_logits: bool = False) -> np.ndarray:
        tokens = torch.tensor([[*sequence.prompt_ids, *sequence.response_ids]])
        where = score_positions(len(sequence.prompt_ids), len(sequence.response_ids))
        logits = (
            model(tokens, use_cache=False).logits[0, where]
            if all_logits
            else model(tokens, use_cache=False, logits_to_keep=torch.arange(where.start, where.stop)).logits[0]
        )
        targets = torch.tensor(sequence.response_ids)
        return logits.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0].numpy()

    return score


def computed_tokens(sequences: list[ScoredSequence], scorer: HuggingFaceScorer) -> int:
    """Tokens that pass through the model if shared prefixes are computed once per forward pass of the scorer."""
    read = [np.array([*s.prompt_ids, *s.response_ids[:-1]]) for s in sequences]
    return sum(
        len(shared_prefixes.one_row([read[i] for i in portion], scorer.device).tokens)
        for portion in shared_prefixes.portions(read, scorer.batch_tokens)
    )


def without_sharing(scorer: HuggingFaceScorer, sequences: list[ScoredSequence]) -> list[np.ndarray]:
    """Score with shared prefixes switched off."""
    with no_shared_prefixes():
        return scorer.score(sequences)


@contextlib.contextmanager
def no_shared_prefixes() -> Iterator[None]:
    """Switch shared prefixes off inside the block."""
    with mock.patch.object(shared_prefixes, "shared_length", lambda first, second: 0):
        yield


if __name__ == "__main__":
    entry.run(main)
