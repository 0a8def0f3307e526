"""Count what a file of preference pairs holds: lengths, repetitions, and every record that cannot be used.

    treg inspect pairs.jsonl
    treg inspect hub:OWNER/NAME --tokenizer MODEL --max-length 2048

Writes nothing. Labelling stops at the first record that cannot be used; this goes on and counts them. The format is
recognised from the first record unless --format names one of these:
"""

import argparse
import json

from treg_megatron.cli.arguments import command_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg inspect``."""
    from treg_megatron.data.formats import AUTO, FORMATS

    formats = "\n".join(f"    {format.name:<18} {format.keys}" for format in FORMATS)
    parser = command_parser(prog, f"{__doc__}\n{formats}\n")
    parser.add_argument("pairs", help="JSON or JSONL (also .gz, .zst), Parquet, a folder, or hub:OWNER/NAME")
    parser.add_argument("--format", default=AUTO, help="name of the format (default: recognised)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="count tokens of this tokenizer instead of characters")
    parser.add_argument("--max-length", type=int, metavar="N", help="count pairs whose prompt and response are longer")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Print the report."""
    from treg_megatron.data.inspection import as_text, inspect_pairs
    from treg_megatron.tokenizer.chat import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    report = inspect_pairs(arguments.pairs, arguments.format, tokenizer, arguments.max_length)
    print(json.dumps(report, ensure_ascii=False) if arguments.json else as_text(report))
