"""The command ``treg``: fast help, scripts in tools/ that run the same commands, torchrun unless a launcher did it."""

import subprocess
import sys
from pathlib import Path

import pytest

from treg_megatron.cli import main
from treg_megatron.cli.completion import whole_command
from treg_megatron.cli.train import processes_here
from treg_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "label_tokens.py": "label",
    "index_pairs.py": "index",
    "sample_responses.py": "sample",
    "rank_responses.py": "rank",
    "import_rewards.py": "import-rewards",
    "inspect_pairs.py": "inspect",
    "show_rewards.py": "show",
    "show_recipe.py": "recipe",
    "streams.py": "datasets",
    "generate_answers.py": "answers",
    "judge_answers.py": "judge",
    "preference_accuracy.py": "accuracy",
    "compare_arms.py": "compare",
}
HEAVY = ("torch", "numpy", "omegaconf", "transformers", "pyarrow")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["", *main.COMMANDS])
def test_help_imports_nothing_heavy(command):
    done = run("-X", "importtime", "-m", "treg_megatron.cli", *command.split(), "--help")
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert imported.isdisjoint(HEAVY)


@pytest.mark.parametrize("command", main.COMMANDS)
def test_every_command_shows_an_example(command):
    text = main.load(command).parser(f"treg {command}").format_help()
    assert "treg " in text.split("options:")[0].split("\n\n", 1)[1], "its help shows no example"


@pytest.mark.parametrize("script, command", SCRIPTS.items())
def test_a_script_is_the_command(script, command):
    found = run(f"tools/{script}", "--help")
    assert found.returncode == 0 and found.stdout.startswith(f"usage: {script} ")
    expected = main.load(command).parser(script).format_help()
    assert " ".join(found.stdout.split()) == " ".join(expected.split())


def test_the_conversion_script_has_three_commands():
    for command in ("import", "export", "verify"):
        done = run("tools/convert_checkpoint.py", command, "--help")
        assert done.returncode == 0 and done.stdout.startswith(f"usage: convert_checkpoint.py {command} ")


def test_an_unknown_command_lists_the_known_ones():
    done = run("-m", "treg_megatron", "trian")
    assert done.returncode == 2 and "invalid choice: 'trian'" in done.stderr and "check-nodes" in done.stderr


def test_completion_knows_commands_options_and_recipes():
    done = run("-m", "treg_megatron", "completion", "bash")
    assert done.returncode == 0
    for expected in ("check-nodes", "--max-revision-length", "llama3_70b_lora"):
        assert expected in done.stdout
    assert whole_command().prog == "treg"


@pytest.mark.parametrize(
    "model_ranks, gpus, on_cpu, expected",
    [(1, 8, 8, 8), (2, 8, 2, 8), (3, 8, 3, 6), (8, 8, 8, 8), (2, 0, 2, 2), (4, 0, 2, 4), (2, 0, 4, 4), (1, 0, 1, 1)],
)
def test_processes_on_this_machine(model_ranks, gpus, on_cpu, expected):
    assert processes_here(model_ranks, gpus, on_cpu) == expected


def test_a_model_that_needs_more_gpus_than_there_are():
    with pytest.raises(UserError, match="= 16 GPUs, this machine has 8"):
        processes_here(16, 8, 16)
