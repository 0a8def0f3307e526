"""Compare two models, each a Hugging Face folder, a Megatron checkpoint or a run.

    treg verify MODEL CHECKPOINT
    treg verify runs/X/train runs/X/hf --text "The capital of France is Paris."

Weights are compared bit for bit. A checkpoint beside a Hugging Face folder is also compared by the log-probs that
Megatron and transformers compute (in fp32, which takes the memory of the whole model).

Exit code 0: the same, 1: different.
"""

import argparse
import sys
from pathlib import Path

from treg_megatron.cli.arguments import command_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg verify``."""
    parser = command_parser(prog, __doc__)
    parser.add_argument("a", metavar="A", type=Path, help="Hugging Face folder, checkpoint, or a run's folder")
    parser.add_argument("b", metavar="B", type=Path, help="another one")
    parser.add_argument("--text", nargs="+", help="texts whose log-probs are compared (default: three short ones)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Compare, print the verdict, and exit with its code."""
    sys.exit(0 if same_model(arguments.a, arguments.b, arguments.text) else 1)


def same_model(a: Path, b: Path, texts: list[str] | None) -> bool:
    """Print what was compared and a verdict; return whether the models are the same."""
    from treg_megatron.checkpoint.compare import compare
    from treg_megatron.checkpoint.layout import is_checkpoint

    weights = compare(a, b)
    same = not weights.different
    print(
        f"weights: {weights.tensors} tensors, {weights.nbytes / 1e9:.2f} GB, "
        + (
            "the same bit for bit"
            if same
            else f"{len(weights.different)} different, the first is {weights.different[0]}"
        )
    )
    if same and is_checkpoint(a) != is_checkpoint(b):
        from treg_megatron.checkpoint import logprobs

        checkpoint, hf = (a, b) if is_checkpoint(a) else (b, a)
        difference = logprobs.logprob_difference(checkpoint, hf, texts or logprobs.TEXTS)
        same = difference.largest <= logprobs.TOLERANCE
        print(
            f"log-probs: {difference.tokens} tokens by Megatron and by transformers, largest difference "
            f"{difference.largest:.1e}, allowed {logprobs.TOLERANCE:.0e}"
        )
    print(f"verdict: {'the same' if same else 'DIFFERENT'}")
    return same
