"""Give every response token a reward and a reference log-prob, by contrastive prompting of a frozen model.

    python tools/label_tokens.py --recipe recipes/X.yaml --pairs pairs.jsonl
    python tools/label_tokens.py --model MODEL --pairs pairs.json --output labelled --prompt-pair few_shot

Reads preference pairs (TRL's explicit prompt form, LLaMA-Factory's sharegpt form; JSON or JSONL) and writes labelled
pairs as Parquet with a manifest. Pairs that do not fit --max-length, revision prompt included, are dropped whole and
counted by reason; nothing is cut. Stopped at any moment, the same command goes on where it was.

Which prompt pair? `revise` is the paper's and suits models of billions of parameters; small ones merely copy the
response that it shows them, and every reward is near 0. For those take `few_shot`, or write a YAML file of your own.
"""

from treg_megatron import errors, recipe


def main() -> None:
    section = recipe.station_section("label", __doc__)
    from treg_megatron.labelling import label

    manifest = label(section)
    rewards, drops = manifest["token_rewards"], manifest["drops"]
    dropped = "; ".join(f"{count} {reason}" for reason, count in drops.items()) or "none"
    print(f"labelled {manifest['pairs']} pairs to {section.output} (dropped: {dropped}); token rewards: mean "
          f"{rewards['chosen_mean']:+.4f} chosen, {rewards['rejected_mean']:+.4f} rejected, "
          f"mean size {rewards['mean_abs']:.4f}")


if __name__ == "__main__":
    errors.run(main)
