"""Print a completion script: commands, options and recipe names after `treg`.

eval "$(treg completion bash)"           in ~/.bashrc
eval "$(treg completion zsh)"            in ~/.zshrc, after compinit
eval `treg completion tcsh`              in ~/.tcshrc
"""

import argparse

from treg_megatron.cli.arguments import command_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg completion``."""
    parser = command_parser(prog, __doc__)
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Print the script."""
    import shtab

    print(shtab.complete(whole_command(), shell=arguments.shell))


def whole_command() -> argparse.ArgumentParser:
    """One parser of all commands, each below ``treg``, which completion reads."""
    from treg_megatron.cli import main
    from treg_megatron.config.recipe import summaries

    whole = argparse.ArgumentParser(prog="treg")
    commands = whole.add_subparsers(dest="command")
    for name, command in main.COMMANDS.items():
        own = main.load(name).parser(f"treg {name}")
        commands.add_parser(name, parents=[own], add_help=False, help=command.help)
        for action in own._actions:
            if "--recipe" in action.option_strings:
                action.choices = list(summaries())
    return whole
