"""The token rewards of the built-in prompt pairs compared: errors found, and agreement with each other.

    python benchmarks/prompt_pairs.py --model HF_FOLDER [--pairs PAIRS.jsonl] [--count 64]

AUROC: on tests/data/planted_errors.jsonl, short answers with a span each that is clearly wrong, the probability that
the first token of an error has a lower reward than a token outside of errors, ties counted half. Beside it the same for
the log-prob log p(y_t | x), the negative of plain surprisal, which needs no prompt pair.

Mean size and correlation (Pearson's, over tokens): on the responses of preference pairs, without end-of-turn tokens.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from treg_megatron.data.labelled_pairs import SIDES
from treg_megatron.data.pairs import Pair, read_pairs
from treg_megatron.labelling.contrastive import contrastive_rewards
from treg_megatron.labelling.prompt_pair import FOLDER, load_prompt_pair
from treg_megatron.labelling.scoring import ScoredSequence
from treg_megatron.labelling.scoring.huggingface import HuggingFaceScorer
from treg_megatron.labelling.source import ContrastivePrompts, Model
from treg_megatron.tokenizer.chat import ChatTokenizer, load_tokenizer
from treg_megatron.tokenizer.conversation import Message
from treg_megatron.utils import entry

ROOT = Path(__file__).resolve().parents[1]
PLANTED = ROOT / "tests" / "data" / "planted_errors.jsonl"
LOG_PROB = "log-prob"


class Rewards(NamedTuple):
    """One response's values, [tokens] each, without the end-of-turn token: the reward of each prompt pair by name, and
    log p(y_t | x)."""

    pair: Pair
    side: str
    values: dict[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder of the reference model")
    parser.add_argument("--pairs", default=ROOT / "demo" / "pairs" / "train.jsonl", help="preference pairs")
    parser.add_argument("--count", type=int, default=64, help="pairs to score, spread evenly over the file")
    parser.add_argument("--max-length", type=int, default=2048, help="pairs with longer sequences are left out")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens per forward pass")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    names = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    tokenizer = load_tokenizer(arguments.model)
    scorer = HuggingFaceScorer(arguments.model, arguments.dtype, "cpu", arguments.batch_tokens)
    planted = list(scored(planted_pairs(), ("rejected",), names, tokenizer, scorer, arguments.max_length))
    pairs = list(read_pairs(arguments.pairs))
    pairs = pairs[:: max(1, len(pairs) // arguments.count)][: arguments.count]
    real = list(scored(pairs, SIDES, names, tokenizer, scorer, arguments.max_length))
    columns = {name: np.concatenate([one.values[name] for one in real]) for name in [*names, LOG_PROB]}
    print(f"AUROC over {len(planted)} planted errors; the rest over {len(real) // 2} pairs of {arguments.pairs}")
    print(f"{'':12} {'AUROC':>6} {'size':>6}", *(f"{name:>12}" for name in columns))
    for name, column in columns.items():
        size = "" if name == LOG_PROB else f"{np.abs(column).mean():.4f}"
        correlations = (np.corrcoef(column, other)[0, 1] for other in columns.values())
        print(f"{name:12} {separation(planted, name, tokenizer):6.3f} {size:>6}", *(f"{c:12.2f}" for c in correlations))
    for name in names:
        print(f"figure auroc_{name} {separation(planted, name, tokenizer):.3f} probability")


def planted_pairs() -> list[Pair]:
    """The correct answers as chosen, those with an error as rejected; a pair's id is its line of the file."""
    items = [json.loads(line) for line in PLANTED.read_text(encoding="utf-8").splitlines()]
    return [
        Pair(json.dumps(item), (Message("user", item["question"]),), item["correct"], item["answer"]) for item in items
    ]


def scored(
    pairs: list[Pair],
    sides: tuple[str, ...],
    names: list[str],
    tokenizer: ChatTokenizer,
    scorer: HuggingFaceScorer,
    max_length: int,
) -> Iterator[Rewards]:
    """The rewards of all prompt pairs for the responses of those pairs whose sequences all fit."""
    sources = [ContrastivePrompts(load_prompt_pair(name), Model("", "")) for name in names]
    kept, sequences = [], []
    for pair in pairs:
        prompt, responses = tokenizer.encode_pair(pair.messages, [getattr(pair, side) for side in sides])
        its = []
        for side, ids in zip(sides, responses, strict=True):
            prompts = [source.prompts(pair, side, prompt, ids, tokenizer).values() for source in sources]
            its += [ScoredSequence(one, ids) for one in (prompt, *(one for two in prompts for one in two))]
        if max(sequence.length for sequence in its) <= max_length:
            kept += [(pair, side) for side in sides]
            sequences += its
    logps = iter([values[:-1] for values in scorer.score(sequences)])
    for pair, side in kept:
        values = {LOG_PROB: next(logps)}
        values |= {name: contrastive_rewards(next(logps), next(logps)) for name in names}
        yield Rewards(pair, side, values)


def separation(planted: list[Rewards], name: str, tokenizer: ChatTokenizer) -> float:
    """AUROC of low values at the first tokens of errors."""
    errors, good = [], []
    for one in planted:
        item, values = json.loads(one.pair.pair_id), one.values[name]
        _, spans = tokenizer.encode_response_with_spans(one.pair.messages, item["answer"])
        wrong = np.array([any(start < end and begin < stop for begin, end in item["errors"]) for start, stop in spans])
        errors.append(-values[wrong.argmax()])
        good.append(-values[~wrong])
    return auroc(np.array(errors), np.concatenate(good))


def auroc(errors: np.ndarray, good: np.ndarray) -> float:
    """Probability that a value of ``errors`` is above one of ``good``, ties counted half."""
    return float(np.mean((errors[:, None] > good).astype(float) + (errors[:, None] == good) / 2))


if __name__ == "__main__":
    entry.run(main)
