"""Count what a file of preference pairs holds: lengths, repetitions, and every record that cannot be used.

    treg inspect pairs.jsonl
    treg inspect pairs.csv --columns prompt=question chosen=answer_good rejected=answer_bad
    treg inspect hub:OWNER/NAME --tokenizer MODEL --max-length 2048 --examples 3

Writes nothing but the page of --html. Labelling stops at the first record that cannot be used; this goes on and counts
them. With a tokenizer, the examples are what training will see: chat template, special tokens and all. A column that
carries meaning and that the format does not read is refused by name: say what it is (--columns), or leave it out on
purpose (--ignore). The format is recognised from the first record unless --format names one of these:
"""

import argparse
import json

from treg_megatron.cli.arguments import columns_of, command_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg inspect``."""
    from treg_megatron.formats import AUTO, FORMATS
    from treg_megatron.formats.columns import FIELDS

    formats = "\n".join(f"    {format.name:<24} {format.keys}" for format in FORMATS)
    parser = command_parser(prog, f"{__doc__}\n{formats}\n")
    parser.add_argument("pairs", help="file, folder, pattern, list with commas, or hub:OWNER/NAME")
    parser.add_argument("--format", default=AUTO, help="name of the format (default: recognised)")
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="FIELD=COLUMN",
        help=f"which column is what, instead of a format; fields: {', '.join(FIELDS)}",
    )
    parser.add_argument("--ignore", nargs="+", default=[], metavar="COLUMN", help="columns to leave out on purpose")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="count tokens of this tokenizer instead of characters")
    parser.add_argument("--template", metavar="NAME", default="", help="its chat template, where it has several")
    parser.add_argument("--max-length", type=int, metavar="N", help="count pairs whose prompt and response are longer")
    parser.add_argument("--examples", type=int, default=2, metavar="N", help="first pairs to print (default: 2)")
    parser.add_argument("--html", metavar="FILE", help="also write the report as a page, with histograms")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Print the report."""
    from treg_megatron.data.inspection import as_text, inspect_pairs, require_usable
    from treg_megatron.data.pairs import Reading
    from treg_megatron.tokenizer.chat import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer, arguments.template) if arguments.tokenizer else None
    reading = Reading(arguments.format, columns_of(arguments.columns), tuple(arguments.ignore))
    report = inspect_pairs(arguments.pairs, reading, tokenizer, arguments.max_length, arguments.examples)
    print(json.dumps(report, ensure_ascii=False) if arguments.json else as_text(report))
    if arguments.html:
        from treg_megatron.data.inspection_page import write_page

        write_page(arguments.html, arguments.pairs, report)
    require_usable(arguments.pairs, report)
