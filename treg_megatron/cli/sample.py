"""Sample several responses to each prompt from the model to be aligned: the first half of on-policy pairs.

    treg sample --recipe llama3_8b --prompts prompts.jsonl
    treg sample --model MODEL --prompts prompts.jsonl --output samples --engine server \\
        --server http://localhost:8000/v1

Reads records with `prompt` (text or messages) or `messages`; from a preference file it takes the prompts. Writes JSONL
with one record per prompt: its responses with their token ids, and whether each was cut off. If it stops, or the server
goes away, rerun the same command to continue. Next: treg rank.
"""

import argparse

from treg_megatron.cli.arguments import parse_section, section_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg sample``."""
    return section_parser(prog, __doc__, "sample")


def run(arguments: argparse.Namespace) -> None:
    """Sample, and print what was written."""
    section = parse_section(arguments, "sample")
    from treg_megatron.sampling.sample import sample

    manifest = sample(section)
    dropped = "; ".join(f"{count} {reason}" for reason, count in manifest["drops"].items()) or "none"
    print(
        f"sampled {manifest['responses']} responses to {manifest['prompts']} prompts into {section.output} "
        f"({manifest['truncated']} were cut off; prompts dropped: {dropped})"
    )
