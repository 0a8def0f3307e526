"""Win rates of arms that one judge judged on the same prompts, with intervals, and their differences.

    treg compare runs/alpha0 runs/alpha0.25 --output runs/comparison
    treg compare JUDGMENTS_A JUDGMENTS_B --alpaca-eval-python alpaca/bin/python
    treg compare MODEL/weighted_alpaca_eval_gpt4_turbo/annotations.json ...

An arm is a run (its evaluate/judgments is read), a folder of `treg judge`, alpaca_eval's annotations.json, or a file of
Arena-Hard's model_judgment. Arms whose prompts, settings, baseline or judge differ are refused: their win rates say
nothing about each other. --output also gets comparison.json and the report.
"""

import argparse
from pathlib import Path

from treg_megatron.cli.arguments import command_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg compare``."""
    parser = command_parser(prog, __doc__)
    parser.add_argument("arms", metavar="ARM", nargs="+", help="a run, a folder of judgments, or a judgment file")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="folder for comparison.json and the report")
    parser.add_argument("--category", help="prompts to keep of Arena-Hard v2: hard_prompt or creative_writing")
    parser.add_argument(
        "--alpaca-eval-python",
        metavar="PYTHON",
        help="interpreter that has alpaca_eval, for length-controlled win rates (default: this one, if it has)",
    )
    parser.add_argument(
        "--df-gamed", metavar="FILE", type=Path, help="alpaca_eval's df_gamed.csv, for the full length control"
    )
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Compare, print the tables, and write them."""
    from treg_megatron.evaluation.comparison.compare import compare, write_comparison
    from treg_megatron.evaluation.report import write_report
    from treg_megatron.evaluation.reporting.text import as_text

    comparison = compare(arguments.arms, arguments.category, arguments.alpaca_eval_python, arguments.df_gamed)
    print(as_text(comparison))
    if arguments.output:
        write_comparison(comparison, arguments.output)
        page, _ = write_report(comparison, arguments.output)
        print(f"\nreport: {page}")
