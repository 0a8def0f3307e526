"""Give every response token a reward and a reference log-prob, by contrastive prompting of a frozen model.

    treg label --recipe llama3_8b --pairs pairs.jsonl
    treg label --model MODEL --pairs pairs.json --output labelled --prompt-pair few_shot
    treg label --recipe llama3_8b --pairs pairs.jsonl --report
    torchrun --nproc-per-node 8 tools/label_tokens.py --recipe llama3_8b --pairs pairs.jsonl

Reads preference pairs in any format that `treg inspect --help` lists (JSON, JSONL, Parquet, Arrow) and writes labelled
pairs as Parquet with a manifest. Pairs that do not fit --max-length are dropped whole and counted by reason; nothing is
truncated. --report counts them beforehand and labels nothing; once --output is labelled, it also says how good the
token rewards are. Under torchrun or srun the processes share the pairs. If it stops, rerun the same command, with any
number of processes, to continue.

Token rewards may also come from other models (--source model_ratio) or with the pairs (--source own), and from several
sources at once under names of their own: label.values in the recipe (docs/TOKEN_REWARDS.md).

A reference model too large for one device is split by Megatron: `--engine megatron --tensor 8` reads the checkpoint
that training starts from; the remaining processes hold further copies of the model.

Which prompt pair? `revise` is the paper's and suits models of billions of parameters; `revise_turn` asks the same in a
further turn and computes fewer tokens, if the chat template allows it. Small models merely copy the response that both
show them, and every reward is near 0: use `few_shot` for those, or `answer`, or a YAML file of your own.
Next: treg show, treg index.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

from treg_megatron.cli.arguments import parse_section, section_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg label``."""
    parser = section_parser(prog, __doc__, "label")
    parser.add_argument(
        "--report",
        action="store_true",
        help="print what the pairs hold (counts, lengths in tokens, repetitions, unusable records) and, if --output is "
        "labelled already, the quality of its token rewards, and stop",
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Label, or report; prints what was written."""
    section = parse_section(arguments, "label")
    if arguments.report:
        from treg_megatron.data.inspection import as_text, inspect_pairs, require_usable
        from treg_megatron.data.pairs import Reading
        from treg_megatron.tokenizer.chat import load_tokenizer

        if section.values:
            named = [f"{name} ({its.get('source', section.source)})" for name, its in section.values.items()]
            print(f"token rewards: {section.source}, and named: {', '.join(named)}")
        tokenizer = load_tokenizer(section.model, section.template or "")
        report = inspect_pairs(section.pairs, Reading.of(section), tokenizer, section.max_length, examples=2)
        print(as_text(report))
        for line in quality_lines(section.output):
            print(line)
        require_usable(section.pairs, report)
        return
    from treg_megatron.labelling.job import label

    manifest = label(section)
    if manifest is None:
        return  # other processes are still labelling; the last one prints the summary
    drops = manifest["drops"]
    dropped = "; ".join(f"{count} {reason}" for reason, count in drops.items()) or "none"
    print(
        f"labelled {manifest['pairs']} pairs to {section.output} (dropped: {dropped}); token rewards: "
        + _means(manifest["token_rewards"])
    )
    for name, rewards in manifest.get("values", {}).items():
        print(f"    {name}: {_means(rewards)}")


def _means(rewards: Mapping[str, float]) -> str:
    return (
        f"mean {rewards['chosen_mean']:+.4f} chosen, {rewards['rejected_mean']:+.4f} rejected, "
        f"mean size {rewards['mean_abs']:.4f}"
    )


def quality_lines(output: str) -> Iterator[str]:
    """The quality of the token rewards in a folder of labelled pairs, line by line; nothing if it is not finished."""
    from treg_megatron.data.labelled_pairs import labelling_run, read_labelled
    from treg_megatron.labelling.quality.measure import measure
    from treg_megatron.labelling.rewards_page import aligned
    from treg_megatron.utils.shard_job import MANIFEST_NAME

    if not Path(output, MANIFEST_NAME).exists():
        return
    labelling_run(output)
    figures = measure(read_labelled(output))
    yield f"\ntoken rewards in {output}:"
    yield from aligned(figures.lines())
    yield from (f"\nwarning: {warning}" for warning in figures.warnings)
