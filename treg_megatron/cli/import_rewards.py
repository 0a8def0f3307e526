"""Turn preference pairs with token rewards of your own into labelled pairs.

    treg import-rewards --pairs rewarded.jsonl --model MODEL --output labelled/own.parquet
    treg import-rewards --recipe llama3_8b --pairs rewarded.jsonl --no-reference

Records are pairs in any format that `treg label` reads, with rewards for token ids, token texts or character spans
(docs/DATA_FORMATS.md). Rewards that do not line up with the model's tokens are refused. The model provides the
tokenizer and the reference log-probs; --no-reference leaves the log-probs out, and then only reference-free objectives
can train on the result. Next: treg index.
"""

import argparse

from treg_megatron.cli.arguments import parse_section, section_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg import-rewards``."""
    parser = section_parser(prog, __doc__, "label")
    parser.add_argument("--no-reference", action="store_true", help="write no reference log-probs; load no model")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Import, and print what was written."""
    section = parse_section(arguments, "label")
    from treg_megatron.labelling.import_rewards import import_token_rewards

    scorer = None
    if not arguments.no_reference:
        from treg_megatron.labelling.scoring.huggingface import HuggingFaceScorer

        scorer = HuggingFaceScorer(section.model, section.dtype, section.device, section.batch_tokens)
    result = import_token_rewards(section, scorer)
    dropped = "; ".join(f"{count} {reason}" for reason, count in result["drops"].items()) or "none"
    snapped = f"; {result['snapped_spans']} spans snapped to words" if result["snapped_spans"] else ""
    print(f"imported {result['pairs']} pairs to {result['file']} (dropped: {dropped}{snapped})")
