"""Sample several responses to each prompt from the model that will be aligned: the first half of on-policy pairs.

    python tools/sample_responses.py --recipe recipes/X.yaml --prompts prompts.jsonl
    python tools/sample_responses.py --model MODEL --prompts prompts.jsonl --output samples --engine server \\
        --server http://localhost:8000/v1

Reads rows with `prompt` (text or messages) or `messages`; of a preference file, the prompts. Writes JSONL with one row
a prompt: its responses with their token ids, and whether they were cut off. Stopped at any moment, or by a server that
is gone, the same command goes on where it was. Then: tools/rank_responses.py.
"""

from treg_megatron.cli.arguments import station_section
from treg_megatron.utils import entry


def main() -> None:
    section = station_section("sample", __doc__)
    from treg_megatron.sampling.sample import sample

    manifest = sample(section)
    dropped = "; ".join(f"{count} {reason}" for reason, count in manifest["drops"].items()) or "none"
    print(
        f"sampled {manifest['responses']} responses to {manifest['prompts']} prompts into {section.output} "
        f"({manifest['truncated']} were cut off; prompts dropped: {dropped})"
    )


if __name__ == "__main__":
    entry.run(main)
