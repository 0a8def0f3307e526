"""Speed of labelling compared with scoring one sequence at a time, and an ablation of its optimisations.

    python benchmarks/labelling.py --model HF_FOLDER [--pairs PAIRS.jsonl] [--prompt-pair few_shot] [--count 16]
    python benchmarks/labelling.py --model HF_FOLDER --pairs LONG.json --named long --prompt-pair revise_turn \
        --against revise --megatron --short

Plain: Hugging Face, one sequence at a time, logits at response positions only, each of a response's three contexts
computed in full. Ours: the engine of tools/label_tokens.py; with --megatron, its other engine as well. All score the
same pairs in the same run, one after the other in each round, and a figure is the median of the rounds' ratios;
tokens/s count all tokens of all three contexts, for everyone. --against adds the plain way of another prompt pair: its
figure compares seconds per pair. Then each optimisation is switched off once, one at a time; --short leaves that out
and scores fewer pairs.

`computed` is the number of tokens that remain if shared prefixes are computed once. It bounds the gain from sharing,
provided that a matrix product takes the same time per token.
"""

import argparse
import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from treg_megatron.checkpoint.from_hf import import_checkpoint
from treg_megatron.data.alignment import score_positions
from treg_megatron.data.labelled_pairs import SIDES
from treg_megatron.data.pairs import Pair, read_pairs
from treg_megatron.data.responses import prompt_answers, scored_response
from treg_megatron.labelling.prompt_pair import load_prompt_pair
from treg_megatron.labelling.scoring import ScoredSequence, Scorer, shared_prefixes
from treg_megatron.labelling.scoring.huggingface import HuggingFaceScorer
from treg_megatron.labelling.scoring.megatron import MegatronScorer
from treg_megatron.labelling.source import ContrastivePrompts, Model
from treg_megatron.tokenizer.chat import load_tokenizer
from treg_megatron.utils import entry

ROOT = Path(__file__).resolve().parents[1]
LARGEST_DIFFERENCE = {"float32": 1e-4, "bfloat16": float("inf")}
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
PLAIN, OURS, MEGATRON = "plain", "ours", "ours, Megatron"

Values = list[np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder of the reference model")
    parser.add_argument("--pairs", default=ROOT / "demo" / "pairs" / "train.jsonl", help="preference pairs")
    parser.add_argument("--prompt-pair", default="few_shot", help="better/worse prompt pair")
    parser.add_argument("--against", help="another prompt pair, whose plain way is timed, too")
    parser.add_argument("--named", default="", help="part of the figures' names that tells these pairs from others")
    parser.add_argument("--megatron", action="store_true", help="also time the Megatron engine, on one rank")
    parser.add_argument("--count", type=int, help="pairs to score, spread evenly over the file (16, short: 2)")
    parser.add_argument("--max-length", type=int, default=2048, help="pairs with longer sequences are left out")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens per forward pass of ours")
    parser.add_argument("--rounds", type=int, default=2, help="runs of everyone that a figure compares")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=list(SHORT))
    parser.add_argument("--short", action="store_true", help="few pairs and no ablation")
    arguments = parser.parse_args()
    arguments.count = arguments.count or (2 if arguments.short else 16)
    names = [arguments.prompt_pair, *([arguments.against] if arguments.against else [])]
    contexts = scored_contexts(arguments, names)
    sequences = contexts[arguments.prompt_pair]
    print(
        f"{len(sequences) // 6} pairs of {arguments.pairs}, prompt pair {arguments.prompt_pair}: {len(sequences)} "
        f"sequences, {total(sequences)} tokens, {min(s.length for s in sequences)} to "
        f"{max(s.length for s in sequences)} each; {torch.get_num_threads()} threads; "
        f"load {os.getloadavg()[0]:.1f} before"
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "megatron" if arguments.megatron else None
        if checkpoint:
            import_checkpoint(arguments.model, checkpoint)
        figures = [figure for dtype in arguments.dtypes for figure in measure(arguments, dtype, contexts, checkpoint)]
    print(f"\nload {os.getloadavg()[0]:.1f} after", *figures, sep="\n")


def scored_contexts(arguments: argparse.Namespace, names: list[str]) -> dict[str, list[ScoredSequence]]:
    """By prompt pair, six sequences per pair: chosen and rejected response after the prompts x, x_better and x_worse.
    A pair that is too long with one prompt pair is left out with all."""
    tokenizer = load_tokenizer(arguments.model)
    reference = Model(arguments.model, "")
    sources = {name: ContrastivePrompts(load_prompt_pair(name), reference) for name in names}

    def six(pair: Pair, source: ContrastivePrompts) -> list[ScoredSequence]:
        prompt = tokenizer.encode_prompt(pair.messages, pair.tools, prompt_answers(pair))
        sequences = []
        for side in SIDES:
            response, _ = scored_response(pair, side, tokenizer)
            prompts = [prompt, *source.prompts(pair, side, prompt, response, tokenizer).values()]
            sequences += [ScoredSequence(one, response) for one in prompts]
        return sequences

    contexts: dict[str, list[ScoredSequence]] = {name: [] for name in names}
    pairs = list(read_pairs(arguments.pairs))
    for pair in pairs[:: max(1, len(pairs) // arguments.count)][: arguments.count]:
        found = {name: six(pair, source) for name, source in sources.items()}
        if max(sequence.length for sequences in found.values() for sequence in sequences) <= arguments.max_length:
            for name, sequences in found.items():
                contexts[name] += sequences
    return contexts


def total(sequences: list[ScoredSequence]) -> int:
    """Tokens of all sequences."""
    return sum(sequence.length for sequence in sequences)


def measure(
    arguments: argparse.Namespace, dtype: str, contexts: dict[str, list[ScoredSequence]], checkpoint: Path | None
) -> list[str]:
    """Time everyone in one precision and print it; return the lines of the figures."""
    sequences = contexts[arguments.prompt_pair]
    plain = plain_scorer(arguments.model, dtype)
    ours = HuggingFaceScorer(arguments.model, dtype, "cpu", arguments.batch_tokens)
    compared: dict[str, Callable[[], Values]] = {
        PLAIN: lambda: [plain(sequence) for sequence in sequences],
        OURS: lambda: ours.score(sequences),
    }
    others: dict[str, Callable[[], Values]] = {
        "ours, nothing shared": lambda: without_sharing(ours, sequences),
        "ours, one pair in a pass": lambda: list(
            itertools.chain.from_iterable(ours.score(sequences[i : i + 6]) for i in range(0, len(sequences), 6))
        ),
        "ours, one sequence in a pass": lambda: [ours.score([sequence])[0] for sequence in sequences],
        "plain, logits of every token": lambda: [plain(sequence, True) for sequence in sequences],
    }
    if arguments.against:
        compared[f"plain, {arguments.against}"] = lambda: [plain(one) for one in contexts[arguments.against]]
    if checkpoint:
        megatron = MegatronScorer(checkpoint, 1, 1, dtype, arguments.batch_tokens)
        compared[MEGATRON] = lambda: megatron.score(sequences)
        others[f"{MEGATRON}, nothing shared"] = lambda: without_sharing(megatron, sequences)
    plain(sequences[0])  # warm-up: the first call of a process sets up kernels
    for scorer in (ours, megatron) if checkpoint else (ours,):
        scorer.score(sequences[:1])
    seconds: dict[str, list[float]] = {name: [] for name in [*compared, *others]}
    values: dict[str, Values] = {}
    for _ in range(arguments.rounds):
        for name, run in compared.items():
            seconds[name].append(timed(run, name, values))
    for name, run in {} if arguments.short else others.items():
        seconds[name].append(timed(run, name, values))
    for name in (OURS, MEGATRON):
        if name in values:
            difference = max(np.abs(a - b).max() for a, b in zip(values[PLAIN], values[name], strict=True))
            print(
                f"\n{dtype}, {name}: {computed_tokens(sequences, ours):,} of {total(sequences):,} tokens computed; "
                f"largest difference of a log-prob {difference:.1e}"
            )
            assert difference < LARGEST_DIFFERENCE[dtype]
    for name, times in seconds.items():
        if times:
            tokens = total(contexts[arguments.against] if name == f"plain, {arguments.against}" else sequences)
            print(
                f"  {name:30} {min(times):7.2f} s {tokens / min(times):9,.0f} tokens/s "
                f"{ratio(seconds[PLAIN], times):6.2f} x plain"
            )
    named = f"{arguments.named}_" * bool(arguments.named) + SHORT[dtype]
    found = {f"label_vs_plain_{named}": ratio(seconds[PLAIN], seconds[OURS])}
    if arguments.against:
        against = seconds[f"plain, {arguments.against}"]
        found[f"label_vs_plain_{arguments.against}_{named}"] = ratio(against, seconds[OURS])
    if checkpoint:
        found[f"label_megatron_vs_plain_{named}"] = ratio(seconds[PLAIN], seconds[MEGATRON])
    return [f"figure {name} {value:.2f} ratio" for name, value in found.items()]


def timed(run: Callable[[], Values], name: str, values: dict[str, Values]) -> float:
    """Seconds of a run, whose result goes into ``values``."""
    start = time.perf_counter()
    values[name] = run()
    return time.perf_counter() - start


def ratio(slower: list[float], faster: list[float]) -> float:
    """Median of the ratios of the rounds; what ran once is compared with the last one."""
    return float(np.median([a / b for a, b in zip(reversed(slower), reversed(faster), strict=False)]))


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
    read = [sequence.read for sequence in sequences]
    return sum(
        len(shared_prefixes.one_row([read[i] for i in portion], scorer.device).tokens)
        for portion in shared_prefixes.portions(read, scorer.batch_tokens)
    )


def without_sharing(scorer: Scorer, sequences: list[ScoredSequence]) -> Values:
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
