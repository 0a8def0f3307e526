"""The command ``treg``: one subcommand per step of a run.

A subcommand's module is imported when it is called, so that ``treg --help`` answers at once.
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import NamedTuple

from treg_megatron.distributed.launch import require_single_process
from treg_megatron.utils import entry


class Command(NamedTuple):
    """A subcommand: the module that has its ``parser`` and ``run``, and its line in ``treg --help``.

    ``ranks``: whether a launcher may start several processes of it, which share the work.
    """

    module: str
    help: str
    ranks: bool = False


COMMANDS = {
    "recipes": Command("recipes", "list the recipes: size, GPUs, memory, hours"),
    "recipe": Command("recipe", "print a recipe with every default and where it comes from, or make a new one"),
    "inspect": Command("inspect", "count what a file of preference pairs holds, and what cannot be used"),
    "sample": Command("sample", "sample responses to prompts from a model"),
    "rank": Command("rank", "make preference pairs of sampled responses: the best against the worst"),
    "import": Command("import_model", "Hugging Face folder to Megatron checkpoint"),
    "label": Command("label", "preference pairs to labelled pairs: token rewards and reference log-probs", ranks=True),
    "import-rewards": Command("import_rewards", "pairs with token rewards of your own to labelled pairs"),
    "show": Command("show", "look at token rewards: a page for the browser, or text"),
    "index": Command("index", "labelled pairs to aligned Megatron indexed datasets"),
    "datasets": Command("datasets", "look at aligned datasets, verify, merge or split them"),
    "preflight": Command("preflight", "check whether a recipe fits a cluster, without a GPU"),
    "accept": Command("accept", "try out this machine: what only its GPUs can tell"),
    "check-nodes": Command("check_nodes", "check the nodes of a job before it starts", ranks=True),
    "train": Command("train", "train: starts torchrun unless a launcher did", ranks=True),
    "export": Command("export", "Megatron checkpoint to Hugging Face folder"),
    "answers": Command("answers", "let a model answer the prompts of a benchmark", ranks=True),
    "judge": Command("judge", "judge a model's answers against a baseline's: reward model, chat server, function"),
    "compare": Command("compare", "win rates of judged arms with intervals, and their differences"),
    "accuracy": Command("accuracy", "preference accuracy of a policy, and its KL from the reference", ranks=True),
    "verify": Command("verify", "compare two models bit for bit, and their log-probs"),
    "completion": Command("completion", "print a completion script for bash, zsh or tcsh"),
}

DESCRIPTION = """\
T-REG, token-level reward regularization for preference optimization, on NeMo and Megatron-core.

From preference pairs to an aligned model, each step reading its section of one recipe:

    treg import --recipe smollm2_135m        Hugging Face folder to Megatron checkpoint
    treg label  --recipe smollm2_135m        token rewards and reference log-probs for every pair
    treg index  --recipe smollm2_135m        labelled pairs to what training reads
    treg train  --recipe smollm2_135m        the same command resumes an interrupted run
    treg export --recipe smollm2_135m        the trained model as a Hugging Face folder

Without pairs, begin with `treg sample` and `treg rank`. Whether it has helped, `treg answers`, `treg judge` and
`treg compare` tell. `treg COMMAND --help` explains each command.
"""


def parser() -> argparse.ArgumentParser:
    """What ``treg --help`` prints; the subcommands parse their own arguments."""
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="treg",
        usage="treg [-h] [--version] [--verbose] COMMAND ...",
        description=f"{DESCRIPTION}\ncommands:\n{listed}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    parser.add_argument("command", metavar="COMMAND", nargs="?", choices=COMMANDS, help="one of the commands above")
    return parser


def main() -> None:
    """The console script ``treg``."""
    entry.run(_main)


def run_script(*commands: str, prog: str | None = None) -> None:
    """Run a command as the script or module that was started, as the files in ``tools/`` do.

    Args:
        commands: one command, or several of which the script's first argument names one.
        prog: how help names the program; by default the script's file name.
    """
    prog = prog or Path(sys.argv[0]).name
    if len(commands) == 1:
        entry.run(lambda: _run(commands[0], sys.argv[1:], prog))
        return
    chooser = argparse.ArgumentParser(
        prog=prog,
        description="\n".join(f"  {name:<8} {COMMANDS[name].help}" for name in commands),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chooser.add_argument("command", choices=commands, help="`COMMAND --help` explains each")
    name = chooser.parse_args(sys.argv[1:2]).command
    entry.run(lambda: _run(name, sys.argv[2:], f"{prog} {name}"))


def load(name: str):
    """The module of a command."""
    return importlib.import_module(f"treg_megatron.cli.{COMMANDS[name].module}")


def _main() -> None:
    words = [word for word in sys.argv[1:] if word != "--verbose"]  # before the command or after it: read by entry.run
    arguments = parser().parse_args(words[:1])
    if arguments.version:
        from treg_megatron import __version__

        print(f"treg-megatron {__version__}")
    elif arguments.command is None:
        parser().print_help()
    else:
        _run(arguments.command, words[1:], f"treg {arguments.command}")


def _run(name: str, argv: list[str], prog: str) -> None:
    module = load(name)
    arguments = module.parser(prog).parse_args(argv)
    if not COMMANDS[name].ranks:
        require_single_process(prog)
    module.run(arguments)
