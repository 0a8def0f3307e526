"""Every command with each of its inputs harmed: one line that names the file and exit code 2, or a right answer."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.support.tiny import tiny_llama, tiny_pair, tiny_tokenizer
from treg_megatron.checkpoint.from_hf import import_checkpoint
from treg_megatron.cli import main
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.labelling.indexing import index
from treg_megatron.labelling.job import label
from treg_megatron.sampling.sample import sample
from treg_megatron.utils import entry

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "tiny.yaml"
NOBODY = 65534

# command, its arguments ({} is the folder of all inputs), and the inputs that it reads
READERS = {
    "recipe": (["{}/recipe.yaml"], ["recipe.yaml"]),
    "inspect": (["{}/pairs.jsonl", "--tokenizer", "{}/hf"], ["pairs.jsonl", "hf/tokenizer.json"]),
    "sample": (
        ["--recipe", "{}/recipe.yaml", "sample.output={}/new"],
        ["recipe.yaml", "prompts.jsonl", "hf/config.json", "hf/model.safetensors", "hf/tokenizer.json"],
    ),
    "rank": (
        ["--recipe", "{}/recipe.yaml", "rank.scores=column", "rank.column=seed", "rank.output={}/new.jsonl"],
        ["samples/manifest.json", "samples/samples-00000.jsonl"],
    ),
    "import": (
        ["--recipe", "{}/recipe.yaml", "--checkpoint", "{}/new"],
        ["recipe.yaml", "hf", "hf/config.json", "hf/model.safetensors"],
    ),
    "label": (
        ["--recipe", "{}/recipe.yaml", "--output", "{}/new"],
        ["recipe.yaml", "pairs.jsonl", "hf", "hf/config.json", "hf/model.safetensors", "hf/tokenizer.json",
         "hf/tokenizer_config.json", "hf/chat_template.jinja", "prompts.yaml"],
    ),
    "import-rewards": (
        ["--recipe", "{}/recipe.yaml", "--pairs", "{}/rewards.jsonl", "--output", "{}/new", "--no-reference"],
        ["rewards.jsonl", "hf/tokenizer.json"],
    ),
    "show": (
        ["--labelled", "{}/labelled", "--tokenizer", "{}/hf", "--text"],
        ["labelled", "labelled/manifest.json", "labelled/shard-00000.parquet", "hf/tokenizer.json"],
    ),
    "index": (
        ["--recipe", "{}/recipe.yaml", "--output", "{}/new"],
        ["labelled", "labelled/manifest.json", "labelled/shard-00000.parquet", "hf/tokenizer.json"],
    ),
    "datasets": (
        ["verify", "{}/streams/train"],
        ["streams/train.manifest.json", "streams/train_tokens.bin", "streams/train_tokens.idx"],
    ),
    "preflight": (
        ["--recipe", "{}/recipe.yaml", "--nodes", "1", "--gpus-per-node", "1"],
        ["recipe.yaml", "hf/config.json", "megatron/treg.json"],
    ),
    "train": (
        ["--recipe", "{}/recipe.yaml", "train.output={}/new"],
        ["recipe.yaml", "hf/tokenizer.json", "streams/train.manifest.json", "streams/train_tokens.idx", "megatron",
         "megatron/treg.json"],
    ),
    "export": (
        ["--recipe", "{}/recipe.yaml", "--checkpoint", "{}/megatron", "--output", "{}/new"],
        ["hf/config.json", "megatron", "megatron/treg.json", "megatron/weights", "megatron/weights/.metadata",
         "megatron/weights/__0_0.distcp", "megatron/weights/metadata.json"],
    ),
    "verify": (["{}/hf", "{}/again"], ["hf", "hf/config.json", "hf/model.safetensors"]),
    "verify checkpoints": (
        ["{}/megatron", "{}/imported_again"],
        ["megatron", "megatron/treg.json", "megatron/weights/__0_0.distcp"],
    ),
}  # fmt: skip


def missing(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def unreadable(path: Path) -> None:
    path.chmod(0)


def other_kind(path: Path) -> None:
    """A folder where a file is due, or a file where a folder is due."""
    is_folder = path.is_dir()
    missing(path)
    path.write_text("a file") if is_folder else path.mkdir()


def dangling(path: Path) -> None:
    missing(path)
    path.symlink_to(path.parent / "nowhere")


def empty(path: Path) -> None:
    if path.is_dir():
        missing(path)
        path.mkdir()
    else:
        path.write_bytes(b"")


def truncated(path: Path) -> None:
    if path.is_dir():
        missing(sorted(path.iterdir())[0])
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])


def not_text(path: Path) -> None:
    if path.is_dir():
        (path / "\udcff").write_bytes(b"\xff\xfe")
    else:
        path.write_bytes(b"\xff\xfe\x00\xd8" + path.read_bytes()[4:])


HARMS = [missing, unreadable, other_kind, dangling, empty, truncated, not_text]

HARMLESS = {
    ("import", "hf", truncated),  # without its chat template, which import does not read
    ("recipe", "recipe.yaml", truncated),
    *(("verify", "hf/config.json", harm) for harm in HARMS),  # weights are compared, of any architecture
    ("verify", "hf", truncated),
}


@pytest.fixture(scope="module")
def inputs() -> Path:
    """Everything that any command reads, in a folder that other users may enter."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hf = folder / "hf"
        tiny_llama(hf, layers=2, hidden=32, vocab=tiny_tokenizer(hf))
        pairs = [tiny_pair(i, f"p{i}") for i in range(9)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        (folder / "prompts.jsonl").write_text(
            "".join(json.dumps({"prompt": pair["prompt"]}) + "\n" for pair in pairs[:2])
        )
        rewards = [
            pair | {f"{side}_spans": [[0, len(pair[side]), 0.1]] for side in ("chosen", "rejected")} for pair in pairs
        ]
        (folder / "rewards.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in rewards))
        builtin = RECIPE.parents[1] / "treg_megatron" / "labelling" / "prompt_pairs" / "revise.yaml"
        shutil.copy(builtin, folder / "prompts.yaml")
        values = {
            "model": {"hf": str(hf)},
            "run": str(folder),
            "label": {
                "pairs": f"{folder}/pairs.jsonl",
                "output": f"{folder}/labelled",
                "prompt_pair": f"{folder}/prompts.yaml",
            },
            "sample": {
                "prompts": f"{folder}/prompts.jsonl",
                "output": f"{folder}/samples",
                "seeds": [1, 2],
                "max_new_tokens": 4,
            },
            "index": {"labelled": f"{folder}/labelled"},
        }
        written = yaml.safe_load(RECIPE.read_text())
        for name_, value in values.items():
            written[name_] = written.get(name_, {}) | value if isinstance(value, dict) else value
        (folder / "recipe.yaml").write_text(yaml.safe_dump(written))
        recipe = load_recipe(folder / "recipe.yaml")
        label(section(recipe, "label"))
        index(section(recipe, "index"))
        import_checkpoint(hf, folder / "megatron")
        sample(section(recipe, "sample"))
        shutil.copytree(hf, folder / "again")
        shutil.copytree(folder / "megatron", folder / "imported_again")
        yield folder


@pytest.fixture
def copy(inputs):
    """A copy of the inputs that a command may harm and write to, and that another user owns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "x"
        shutil.copytree(inputs, folder)
        recipe = folder / "recipe.yaml"
        recipe.write_text(recipe.read_text().replace(str(inputs), str(folder)))
        yield folder


def run(folder: Path, command: str, capsys, as_another_user: bool = False) -> tuple[int, str]:
    """Exit code and error output of a command; as another user than root, whom permissions do not bind."""
    arguments = [argument.format(folder) for argument in READERS[command][0]]
    name = command.split()[0]
    if as_another_user and os.geteuid() == 0:
        for path in [folder.parent, folder, *folder.rglob("*")]:
            if not path.is_symlink():
                os.chown(path, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    code = 0
    try:
        entry.run(lambda: main._run(name, arguments, f"treg {name}"))
    except SystemExit as stop:
        code = stop.code
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
    return code, capsys.readouterr().err


@pytest.fixture(autouse=True)
def commands_that_stop_before_the_heavy_part(monkeypatch):
    """`treg train` up to the point where it would start torchrun, after its own checks; `verify` without log-probs."""
    from treg_megatron import train
    from treg_megatron.cli import train as train_command

    monkeypatch.setattr(train_command, "run", lambda arguments: train.checked(train_command.parse_recipe(arguments)))


@pytest.mark.parametrize("command", READERS)
def test_unharmed(command, copy, capsys):
    code, said = run(copy, command, capsys)
    assert code == 0, said


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
@pytest.mark.parametrize(
    "command, path", [(command, path) for command, (_, paths) in READERS.items() for path in paths]
)
def test_harmed(command, path, harm: Callable[[Path], None], copy, capsys):
    harm(copy / path)
    code, said = run(copy, command, capsys, as_another_user=harm is unreadable)
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code == 0:
        assert (command, path, harm) in HARMLESS or harm is not_text, said
        return
    assert code == 2 and len(errors) == 1, said
    if (path, harm) == ("recipe.yaml", truncated):
        return  # a shorter recipe, whose values are missing
    assert Path(path).name in errors[0] or str(copy / Path(path).parent) in errors[0], errors[0]
