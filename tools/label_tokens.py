"""Give every response token a reward and a reference log-prob, by contrastive prompting of a frozen model.

    python tools/label_tokens.py --recipe recipes/X.yaml --pairs pairs.jsonl
    python tools/label_tokens.py --model MODEL --pairs pairs.json --output labelled --prompt-pair few_shot
    python tools/label_tokens.py --recipe recipes/X.yaml --pairs pairs.jsonl --report
    torchrun --nproc-per-node 8 tools/label_tokens.py --recipe recipes/X.yaml --pairs pairs.jsonl

Reads preference pairs of any kind that inspect_pairs.py lists (JSON, JSONL, Parquet, Arrow) and writes labelled
pairs as Parquet with a manifest. Pairs that do not fit --max-length are dropped whole and counted by reason; nothing
is cut. `--report` counts them beforehand and labels nothing. Under torchrun or srun the processes share the pairs out.
Stopped at any moment, the same command goes on where it was, with any number of processes.

A reference model that is too large for one device is labelled with by Megatron: `--engine megatron --tensor 8` takes
the checkpoint that training starts from; processes that one copy of the model leaves over hold further copies.

Which prompt pair? `revise` is the paper's and suits models of billions of parameters; small ones merely copy the
response that it shows them, and every reward is near 0. For those take `few_shot`, or write a YAML file of your own.
"""

import argparse

from treg_megatron.cli.arguments import add_section_arguments, parse_section
from treg_megatron.utils import entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--report",
        action="store_true",
        help="say what the pairs are (counts, lengths in tokens, repetitions, rows that cannot be used), and stop",
    )
    add_section_arguments(parser, "label")
    arguments = parser.parse_args()
    section = parse_section(arguments, "label")
    if arguments.report:
        from treg_megatron.data.inspection import as_text, inspect_pairs
        from treg_megatron.tokenizer.chat import load_tokenizer

        print(as_text(inspect_pairs(section.pairs, section.format, load_tokenizer(section.model), section.max_length)))
        return
    from treg_megatron.labelling.job import label

    manifest = label(section)
    if manifest is None:
        return  # other processes are at work still; the last one says how it went
    rewards, drops = manifest["token_rewards"], manifest["drops"]
    dropped = "; ".join(f"{count} {reason}" for reason, count in drops.items()) or "none"
    print(
        f"labelled {manifest['pairs']} pairs to {section.output} (dropped: {dropped}); token rewards: mean "
        f"{rewards['chosen_mean']:+.4f} chosen, {rewards['rejected_mean']:+.4f} rejected, "
        f"mean size {rewards['mean_abs']:.4f}"
    )


if __name__ == "__main__":
    entry.run(main)
