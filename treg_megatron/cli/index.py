"""Turn labelled pairs into aligned Megatron indexed datasets, the form that training reads.

    treg index --recipe llama3_8b
    treg index --labelled labelled --output streams/train --tokenizer MODEL

The input is what `treg label` wrote, any Parquet file with the same columns, or, for reference-free objectives, a text
file of pairs with token rewards of your own (docs/DATA_FORMATS.md). Every record is checked, and the tokenizer must be
the one that made the tokens. Writes PREFIX_tokens, PREFIX_token_rewards, PREFIX_ref_logprobs and PREFIX_pair_ids (.bin
and .idx) and PREFIX.manifest.json; they appear together when everything is written. Next: treg train.
"""

import argparse

from treg_megatron.cli.arguments import parse_section, section_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg index``."""
    return section_parser(prog, __doc__, "index")


def run(arguments: argparse.Namespace) -> None:
    """Index, and print what was written."""
    section = parse_section(arguments, "index")
    from treg_megatron.labelling.indexing import index

    manifest = index(section)
    print(
        f"indexed {manifest['pairs']} pairs, {manifest['tokens']} tokens ({manifest['response_tokens']} in "
        f"responses, longest sequence {manifest['longest_sequence']}) to {section.output}"
    )
