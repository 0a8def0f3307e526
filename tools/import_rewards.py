"""Turn preference pairs with token rewards of your own into labelled pairs, the input of index_pairs.

    python tools/import_rewards.py --pairs rewarded.jsonl --model MODEL --output labelled/own.parquet
    python tools/import_rewards.py --recipe recipes/X.yaml --pairs rewarded.jsonl --no-reference

Rows are pairs of any format that label_tokens reads, with rewards for token ids, token texts or spans of characters
(docs/DATA_FORMATS.md). What does not line up with the model's tokens is refused. The model gives the tokenizer, and the
reference log-probs unless --no-reference leaves them out (then only reference-free objectives can train on the result).
"""

import argparse

from treg_megatron.cli.arguments import add_section_arguments, parse_section
from treg_megatron.utils import entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-reference", action="store_true", help="write no reference log-probs; no model is loaded")
    add_section_arguments(parser, "label")
    arguments = parser.parse_args()
    section = parse_section(arguments, "label")
    from treg_megatron.labelling.import_rewards import import_token_rewards

    scorer = None
    if not arguments.no_reference:
        from treg_megatron.labelling.scoring.huggingface import HuggingFaceScorer

        scorer = HuggingFaceScorer(section.model, section.dtype, section.device, section.batch_tokens)
    result = import_token_rewards(section, scorer)
    dropped = "; ".join(f"{count} {reason}" for reason, count in result["drops"].items()) or "none"
    print(f"imported {result['pairs']} pairs to {result['file']} (dropped: {dropped})")


if __name__ == "__main__":
    entry.run(main)
