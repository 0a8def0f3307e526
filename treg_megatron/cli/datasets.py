"""Look at aligned datasets, check every byte of them, merge several, or split one into training and validation.

    treg datasets info PREFIX ...
    treg datasets verify PREFIX ...
    treg datasets merge OUTPUT PREFIX PREFIX ...
    treg datasets split PREFIX --train OUTPUT --validation OUTPUT --fraction 0.02

`merge` keeps the order in which the datasets are named. `split` decides by a hash of the prompt: no prompt is on both
sides, and a pair stays on its side whatever else the dataset holds. Training can also blend several without merging
them: data.train="0.3 A 0.7 B".
"""

import argparse
import json

from treg_megatron.cli.arguments import command_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg datasets``."""
    parser = command_parser(prog, __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="info|verify|merge|split")
    for name, help in (("info", "what manifest and index say"), ("verify", "also compare every byte with its hash")):
        command = commands.add_parser(name, help=help)
        command.add_argument("prefixes", nargs="+", metavar="PREFIX")
    merge = commands.add_parser("merge", help="several into one, in the order named")
    merge.add_argument("output", metavar="OUTPUT")
    merge.add_argument("prefixes", nargs="+", metavar="PREFIX")
    split = commands.add_parser("split", help="one into training and validation")
    split.add_argument("prefixes", nargs=1, metavar="PREFIX")
    split.add_argument("--train", required=True, metavar="OUTPUT")
    split.add_argument("--validation", required=True, metavar="OUTPUT")
    split.add_argument("--fraction", required=True, type=float, help="share of the pairs that validate, in (0, 1)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Do what the subcommand says."""
    from treg_megatron.data import streams

    if arguments.command == "merge":
        manifest = streams.merge_streams(arguments.output, arguments.prefixes)
        print(f"merged {len(arguments.prefixes)} streams to {arguments.output}: {manifest['pairs']} pairs")
    elif arguments.command == "split":
        outputs = (arguments.train, arguments.validation)
        manifests = streams.split_streams(streams.verify(arguments.prefixes[0]), outputs, arguments.fraction)
        for output, manifest in zip(outputs, manifests, strict=True):
            print(f"{output}: {manifest['pairs']} pairs")
    else:
        for prefix in arguments.prefixes:
            opened = (streams.verify if arguments.command == "verify" else streams.open_streams)(prefix)
            content = {name: value for name, value in opened.manifest.items() if name != "files"}
            print(
                json.dumps({"prefix": str(prefix), **content}, indent=2, ensure_ascii=False)
                if arguments.command == "info"
                else f"{prefix}: {len(opened)} pairs, every byte as it was written"
            )
