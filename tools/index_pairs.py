"""Turn labelled pairs into aligned Megatron indexed datasets, the form that training reads.

    python tools/index_pairs.py --recipe recipes/X.yaml
    python tools/index_pairs.py --labelled labelled --output streams/train --tokenizer MODEL

The input is what label_tokens.py wrote, any Parquet file of the same columns, or, for reference-free objectives, a text
file of pairs with token rewards of your own (docs/DATA_FORMATS.md). Every row is checked, and the tokenizer must be the one that made the tokens. Output is
PREFIX_tokens, PREFIX_token_rewards, PREFIX_ref_logprobs and PREFIX_pair_ids (.bin and .idx) and PREFIX.manifest.json;
they appear together when all is written.
"""

from treg_megatron.cli.arguments import station_section
from treg_megatron.utils import entry


def main() -> None:
    section = station_section("index", __doc__)
    from treg_megatron.labelling.indexing import index

    manifest = index(section)
    print(
        f"indexed {manifest['pairs']} pairs, {manifest['tokens']} tokens ({manifest['response_tokens']} in "
        f"responses, longest sequence {manifest['longest_sequence']}) to {section.output}"
    )


if __name__ == "__main__":
    entry.run(main)
