"""The wheel, installed into a separate environment without the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: files of the checkout that only an editable install puts on the path
OURS = ("treg_megatron*", "__editable__*treg*")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built only from tracked files, so that other files in the checkout cannot help."""
    source, output = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    archive = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in archive.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(output), "."]
    subprocess.run(build, cwd=source, check=True, capture_output=True, text=True)
    return next(output.glob("*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A new virtual environment: the wheel, and links to the dependencies that are installed here."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    here = Path(sysconfig.get_path("purelib"))
    ours = {path for pattern in OURS for path in here.glob(pattern)}
    for path in here.iterdir():
        if path not in ours and path.suffix != ".pth" and path.name != "__pycache__":
            (packages / path.name).symlink_to(path)
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-q", "--no-deps"]
    subprocess.run([*install, "--no-index", str(wheel)], check=True, capture_output=True, text=True)
    return folder


@pytest.fixture
def treg(environment, tmp_path):
    """Run ``treg`` of the new environment in an empty folder; returns its standard output."""

    def run(*arguments: str | Path) -> str:
        variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        command = [str(environment / "bin" / "treg"), *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_package_comes_from_the_wheel(environment, tmp_path):
    program = "import sys, treg_megatron; print(treg_megatron.__file__); print(*sys.path, sep='\\n')"
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    python = str(environment / "bin" / "python")
    found, *path = subprocess.run(
        [python, "-c", program], cwd=tmp_path, env=variables, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert Path(found).is_relative_to(environment)
    assert str(ROOT) not in path


def test_recipes_are_found_by_name_and_printed(treg):
    assert "llama3_8b_lora" in treg("recipe") and "llama3.1_405b" in treg("recipes")
    printed = treg("recipe", "llama3_8b", "data.seed=7")
    assert "name: llama3_8b" in printed and "seed: 7" in printed and "# the command line" in printed


def test_preflight_of_a_shipped_recipe(treg):
    assert "fits" in treg("preflight", "--recipe", "smollm2_135m")


def test_two_pairs_are_labelled_and_shown(treg, tmp_path):
    from tests.support.tiny import tiny_llama, tiny_pair, tiny_tokenizer

    tiny_llama(tmp_path / "hf", vocab=tiny_tokenizer(tmp_path / "hf"))
    with open(tmp_path / "pairs.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(tiny_pair(number, f"pair-{number}")) + "\n" for number in range(2))
    inputs = ["--recipe", "tiny", "--model", "hf", "--pairs", "pairs.jsonl", "--output", "labelled"]
    assert "labelled 2 pairs to labelled" in treg("label", *inputs)
    treg("show", "--labelled", "labelled", "--tokenizer", "hf", "--output", "rewards.html")
    assert (tmp_path / "rewards.html").stat().st_size > 1000
