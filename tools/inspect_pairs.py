"""Say what a file of preference pairs holds: counts, lengths, repetitions, and every row that cannot be used.

    python tools/inspect_pairs.py pairs.jsonl
    python tools/inspect_pairs.py hub:OWNER/NAME --tokenizer MODEL --max-length 2048

Nothing is written. label_tokens stops at the first row that cannot be used; this page goes on and counts them. The kind
of pairs is recognised by the first row unless --format names it.
"""

import argparse
import json

from treg_megatron.data.formats import FORMATS
from treg_megatron.data.pairs import AUTO
from treg_megatron.utils import entry


def main() -> None:
    kinds = "\n".join(f"    {format.name:<18} {format.keys}" for format in FORMATS)
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{kinds}\n", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", help="JSON or JSONL (also .gz, .zst), Parquet, a folder, or hub:OWNER/NAME")
    parser.add_argument("--format", default=AUTO, help="name of the kind of pairs (default: recognised)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="count tokens of this tokenizer instead of characters")
    parser.add_argument("--max-length", type=int, metavar="N", help="count pairs whose prompt and response are longer")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    arguments = parser.parse_args()
    from treg_megatron.data.inspection import as_text, inspect_pairs
    from treg_megatron.tokenizer.chat import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    report = inspect_pairs(arguments.pairs, arguments.format, tokenizer, arguments.max_length)
    print(json.dumps(report, ensure_ascii=False) if arguments.json else as_text(report))


if __name__ == "__main__":
    entry.run(main)
