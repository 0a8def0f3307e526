"""What only this machine's GPUs can tell, in a quarter of an hour: run it first on new hardware or versions.

    treg accept                       # every GPU of this machine
    treg accept --only collectives "train CP2"
    treg accept --cpu                 # CPU ranks: shows that the checks themselves work

Needs no network, model or data. Runs NCCL's collectives, the log-prob head against float64, tiny trainings in every
layout that the GPUs allow against losses computed on a CPU, a kill with resume and export, labels of both engines, and
counts the waits of the host inside a micro-batch. Trains a model of few layers as wide as an 8B one: its memory against
preflight's prediction, and its rate with and without overlapped communication. CPU ranks run all of it with device
labels, and a tiny model where the wide one would say nothing.

Writes acceptance.md and acceptance.json, after every check. A failure hides none of the others; each has a log beside
the card. Exit code 1 means that a check failed. Please send the card: docs/HARDWARE.md collects them.
"""

import argparse
import sys
from pathlib import Path

from treg_megatron.cli.arguments import command_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg accept``."""
    parser = command_parser(prog, __doc__)
    parser.add_argument("--output", type=Path, default=Path("acceptance"), help="new folder to write (%(default)s)")
    parser.add_argument("--cpu", action="store_true", help="use CPU ranks, also where there are GPUs")
    parser.add_argument("--only", nargs="+", default=[], metavar="CHECK", help="names of checks (default: all)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run the checks and print where the card is."""
    from treg_megatron.accept.run import accept

    results = accept(arguments.output, arguments.cpu, arguments.only)
    failed = [result.name for result in results if result.status == "FAIL"]
    print(
        f"{len(results) - len(failed)} of {len(results)} checks without a failure, see {arguments.output}/acceptance.md"
    )
    if failed:
        print(f"failed: {', '.join(failed)}")
        sys.exit(1)
