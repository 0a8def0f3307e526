"""Make preference pairs of sampled responses: the best against the worst of each prompt.

    python tools/rank_responses.py --recipe recipes/X.yaml --reward-model REWARD_MODEL
    python tools/rank_responses.py --samples samples --output pairs.jsonl --scores function --function mine:scores
    python tools/rank_responses.py --samples samples --output pairs.jsonl --scores column --column score

Scores come from a Hugging Face sequence-classification model, from your own function (messages, responses) -> numbers,
or from a key of each response in the samples. Pairs keep the token ids that were sampled, and labels use them as they
are. A reward model that brings Python code (ArmoRM does) runs it only with --allow-remote-code true.
"""

from treg_megatron.cli.arguments import station_section
from treg_megatron.utils import entry


def main() -> None:
    section = station_section("rank", __doc__)
    from treg_megatron.sampling.rank import rank

    ranked = rank(section)
    for what, drops in (("prompts", ranked.dropped_prompts), ("responses", ranked.dropped_responses)):
        print(f"{what} left out: " + ("; ".join(f"{count} {reason}" for reason, count in drops.items()) or "none"))
    print(f"wrote {ranked.pairs} pairs to {section.output}")


if __name__ == "__main__":
    entry.run(main)
