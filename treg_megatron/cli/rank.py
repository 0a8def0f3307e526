"""Make preference pairs of sampled responses: the best against the worst for each prompt.

    treg rank --recipe llama3_8b --reward-model REWARD_MODEL
    treg rank --samples samples --output pairs.jsonl --scores function --function mine:scores
    treg rank --samples samples --output pairs.jsonl --scores column --column score

Scores come from a Hugging Face sequence-classification model, from your own function (messages, responses) -> numbers,
or from a key of each response in the samples. Pairs keep the sampled token ids, and labelling uses those ids as they
are. A reward model that ships Python code (ArmoRM does) runs it only with --allow-remote-code true. Next: treg label.
"""

import argparse

from treg_megatron.cli.arguments import parse_section, section_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg rank``."""
    return section_parser(prog, __doc__, "rank")


def run(arguments: argparse.Namespace) -> None:
    """Rank, and print what was written."""
    section = parse_section(arguments, "rank")
    from treg_megatron.sampling.rank import rank

    ranked = rank(section)
    for what, drops in (("prompts", ranked.dropped_prompts), ("responses", ranked.dropped_responses)):
        print(f"{what} left out: " + ("; ".join(f"{count} {reason}" for reason, count in drops.items()) or "none"))
    print(f"wrote {ranked.pairs} pairs to {section.output}")
