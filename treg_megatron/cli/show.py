"""Look at token rewards before training on them: a page for the browser, or text for the terminal.

    treg show --labelled runs/X/labelled/train --tokenizer MODEL --output rewards.html
    treg show --labelled runs/X/labelled/train --tokenizer MODEL --text
    treg show ... --values oracle             # other token rewards of the labels, by their name in label.values
    treg show --labelled runs/X/labelled/train --tokenizer MODEL --json > quality.json
    treg show ... --policy RUN_OR_MODEL       # a trained policy's implicit token rewards beside them

The page is one file that needs no network: each pair side by side with its tokens shaded by reward, to sort and filter,
and figures and curves on the quality of the labels over all pairs. It warns if the reference model merely copies.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treg_megatron.cli.arguments import command_parser
from treg_megatron.errors import UserError

if TYPE_CHECKING:
    from treg_megatron.labelling.scoring import Scorer

BATCH_TOKENS = 8192  # of a policy's forward pass


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg show``."""
    parser = command_parser(prog, __doc__)
    parser.add_argument("--labelled", required=True, metavar="DIR", help="labelled pairs: a folder or a Parquet file")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="Hugging Face folder of their tokenizer")
    parser.add_argument("--output", default="rewards.html", metavar="HTML", help="the page to write (%(default)s)")
    parser.add_argument("--values", metavar="NAME", help="show these named token rewards instead of the main ones")
    parser.add_argument("--text", action="store_true", help="print to the terminal and write no page")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object and write no page")
    parser.add_argument("--pairs", type=int, default=200, metavar="N", help="show the first N pairs (%(default)s)")
    parser.add_argument(
        "--policy",
        metavar="DIR",
        help="a trained policy: Megatron checkpoint, a run (its newest one), or Hugging Face folder",
    )
    parser.add_argument("--device", default="auto", help="where a Hugging Face policy runs: auto, cpu or cuda")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Write the page, or print the text."""
    if arguments.pairs < 1:
        raise UserError(f"--pairs {arguments.pairs} must be at least 1")
    from treg_megatron.data.labelled_pairs import columns_beside, labelling_run, read_labelled
    from treg_megatron.labelling import rewards_page
    from treg_megatron.labelling.quality.measure import measure
    from treg_megatron.tokenizer.chat import load_tokenizer

    tokenizer, run = load_tokenizer(arguments.tokenizer), labelling_run(arguments.labelled) or {}
    if run.get("tokenizer", {}).get("sha256", tokenizer.sha256) != tokenizer.sha256:
        raise UserError(f"{arguments.labelled} was labelled with another tokenizer than that of {arguments.tokenizer}")
    shown = list(itertools.islice(read_labelled(arguments.labelled, values=arguments.values), arguments.pairs))
    if not shown:
        raise UserError(f"{arguments.labelled} holds no pairs")
    figures, policy = measure(read_labelled(arguments.labelled, values=arguments.values)), None
    if arguments.json:
        print(json.dumps(figures.as_json(), ensure_ascii=False))
        return
    if arguments.policy:
        if any(pair.chosen_ref_logprobs is None for pair in shown):
            raise UserError(f"{arguments.labelled} has no reference log-probs, which implicit rewards are relative to")
        policy = rewards_page.policy_rewards(shown, load_policy(arguments.policy, arguments.device))
    beside = columns_beside(arguments.labelled)
    if arguments.text:
        for line in beside:
            print(f"also holds {line}")
        for line in rewards_page.text_report(figures, shown, tokenizer.decode, sys.stdout.isatty(), policy):
            print(line)
        return
    source = ", ".join([str(arguments.labelled), *_made_by(run, arguments.values), *beside])
    if len(shown) < figures.pairs:
        source += f"; the first {len(shown)} of {figures.pairs} pairs are shown, figures and curves cover all"
    rewards_page.write_page(arguments.output, source, figures, shown, tokenizer.decode, policy)
    print(f"wrote {arguments.output}: {len(shown)} pairs, mean size of a reward {figures.main.mean_abs:.4f}")
    for warning in figures.warnings:
        print(f"warning: {warning}")


def _made_by(run: dict[str, Any], values: str | None) -> Iterator[str]:
    """What made the token rewards that are shown, one phrase each."""
    reference = run.get("reference") or {}
    if name := reference.get("name", reference.get("model")):
        yield f"reference {name}"
    if values:
        yield f"values {values}"
    made = run.get("values", {}).get(values, {}) if values else run
    if "prompt_pair" in made:
        yield f"prompt pair {made['prompt_pair']['name']}"
    if source := made.get("source"):
        if source["kind"] == "own":
            yield "values that came with the pairs"
        else:
            yield f"log-ratio of {source['better']['name']} to {source.get('worse', reference)['name']}"


def load_policy(folder: str, device: str) -> "Scorer":
    """The policy in fp32, in this one process."""
    from treg_megatron.checkpoint.layout import is_checkpoint

    if is_checkpoint(Path(folder)):
        from treg_megatron.labelling.scoring.megatron import MegatronScorer

        return MegatronScorer(folder, tensor=1, pipeline=1, dtype="float32", batch_tokens=BATCH_TOKENS)
    from treg_megatron.labelling.scoring.huggingface import HuggingFaceScorer

    return HuggingFaceScorer(folder, "float32", device, BATCH_TOKENS)
