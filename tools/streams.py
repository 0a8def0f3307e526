"""Look at aligned streams, check every byte of them, join several, or divide them into training and validation.

    python tools/streams.py info PREFIX ...
    python tools/streams.py verify PREFIX ...
    python tools/streams.py merge OUTPUT PREFIX PREFIX ...
    python tools/streams.py split PREFIX --train OUTPUT --validation OUTPUT --fraction 0.02

`merge` keeps the order in which the streams are named. `split` decides by a hash of pair_id: a pair stays on its side,
whatever else the streams hold. Several streams can also be trained on without joining them: data.train="0.3 A 0.7 B".
"""

import argparse
import json

from treg_megatron.utils import entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="info|verify|merge|split")
    for name, help in (("info", "what streams hold, from manifest and index"), ("verify", "also every byte's hash")):
        command = commands.add_parser(name, help=help)
        command.add_argument("prefixes", nargs="+", metavar="PREFIX")
    merge = commands.add_parser("merge", help="several streams to one, in the order named")
    merge.add_argument("output", metavar="OUTPUT")
    merge.add_argument("prefixes", nargs="+", metavar="PREFIX")
    split = commands.add_parser("split", help="one to training and validation")
    split.add_argument("prefixes", nargs=1, metavar="PREFIX")
    split.add_argument("--train", required=True, metavar="OUTPUT")
    split.add_argument("--validation", required=True, metavar="OUTPUT")
    split.add_argument("--fraction", required=True, type=float, help="share of the pairs that validate, in (0, 1)")
    arguments = parser.parse_args()
    from treg_megatron.data import streams

    if arguments.command == "merge":
        manifest = streams.merge_streams(arguments.output, arguments.prefixes)
        print(f"merged {len(arguments.prefixes)} streams to {arguments.output}: {manifest['pairs']} pairs")
    elif arguments.command == "split":
        outputs = (arguments.train, arguments.validation)
        for output, manifest in zip(
            outputs, streams.split_streams(streams.verify(arguments.prefixes[0]), outputs, arguments.fraction)
        ):
            print(f"{output}: {manifest['pairs']} pairs")
    else:
        for prefix in arguments.prefixes:
            opened = (streams.verify if arguments.command == "verify" else streams.open_streams)(prefix)
            told = {name: value for name, value in opened.manifest.items() if name != "files"}
            print(
                json.dumps({"prefix": str(prefix), **told}, indent=2, ensure_ascii=False)
                if arguments.command == "info"
                else f"{prefix}: {len(opened)} pairs, every byte as it was written"
            )


if __name__ == "__main__":
    entry.run(main)
