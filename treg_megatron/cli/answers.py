"""Let a model answer the prompts of a benchmark, in the form that the benchmark's own tools read.

    treg answers --recipe llama3_8b --prompts alpaca_eval.json
    treg answers --model runs/X --benchmark arena_hard_v0.1 --prompts question.jsonl --output runs/X/arena_hard
    torchrun --nproc-per-node 8 tools/generate_answers.py --recipe llama3_8b --prompts alpaca_eval.json

AlpacaEval, Arena-Hard (v0.1 and v2) and MT-Bench (two turns), or any prompts (`--benchmark prompts`). The model is a
Hugging Face folder, a run's folder for what it exported, or a server. Temperature, top-p, stops and lengths that the
recipe leaves null are those of published evaluations of the benchmark and the model's family; they are printed with
their source, and recorded. Under torchrun or srun the processes share the prompts. If it stops, rerun the same command,
with any number of processes, to continue: the answers are the same. Next: treg judge.
"""

import argparse

from treg_megatron.cli.arguments import parse_section, section_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg answers``."""
    return section_parser(prog, __doc__, "evaluate")


def run(arguments: argparse.Namespace) -> None:
    """Answer, and print what was written."""
    section = parse_section(arguments, "evaluate")
    from treg_megatron.evaluation.answering.job import answers

    manifest = answers(section)
    if manifest is None:
        return  # other processes are still answering; the last one prints the summary
    tokens = "" if manifest["mean_tokens"] is None else f"{manifest['mean_tokens']:.1f} tokens, "
    of = "" if manifest["benchmark"] == "prompts" else f" of {manifest['benchmark']}"
    files = ", ".join(manifest["files"]) or "no file of a benchmark"
    print(
        f"{manifest['name']} answered {manifest['prompts']} prompts{of} into {section.output} "
        f"({files}); on average {tokens}{manifest['mean_characters']:.0f} characters; {manifest['truncated']} answers "
        "were cut off"
    )
