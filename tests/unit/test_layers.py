"""The layers of the package: no upward or circular imports, and docs/ARCHITECTURE.md names every module."""

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "treg_megatron"
#: lowest first: a module imports from its own folder and from those before it
LAYERS = (
    *("errors", "utils", "config", "objective", "kernels", "distributed", "tokenizer", "formats", "containers"),
    *("data", "models", "checkpoint", "sampling", "labelling", "evaluation", "training", "preflight", "accept"),
    *("cli", "train", "node_check", "__main__"),
)


def modules(root: Path) -> dict[str, Path]:
    """Path of each module by its dotted name below the package, packages by the name of their folder."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path], at_the_head: bool = False) -> Iterator[str]:
    """Modules of the package that a file imports, in functions too unless ``at_the_head``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_the_head else ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE]
        for name in names:
            inside = name.removeprefix(PACKAGE).removeprefix(".")
            yield inside if inside in known else inside.rpartition(".")[0]


def layer(name: str) -> int:
    if name.endswith("__main__"):
        return len(LAYERS)
    return LAYERS.index(name.split(".")[0])


def upward_imports(root: Path) -> list[str]:
    known = modules(root)
    return [
        f"{name} imports {other}"
        for name, path in known.items()
        if name
        for other in imports(path, known)
        if other and layer(other) > layer(name)
    ]


@pytest.mark.slow
def test_no_import_goes_up():
    assert upward_imports(ROOT) == []


@pytest.mark.slow
@pytest.mark.parametrize("planted", ["from treg_megatron.train import train", "import treg_megatron.cli.main"])
def test_an_upward_import_is_found(tmp_path, planted):
    shutil.copytree(ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__", "*.json"))
    module = tmp_path / PACKAGE / "data" / "pairs.py"
    module.write_text(module.read_text(encoding="utf-8") + f"\n\ndef planted():\n    {planted}\n", encoding="utf-8")
    assert len(upward_imports(tmp_path)) == 1


def test_no_modules_import_each_other_in_a_circle():
    known = modules(ROOT)
    graph = {name: set(imports(path, known, at_the_head=True)) - {"", name} for name, path in known.items()}
    while removable := [name for name, needed in graph.items() if not needed & graph.keys()]:
        for name in removable:
            del graph[name]
    assert graph == {}


def test_folders_with_subfolders_hold_at_most_ten_modules():
    for folder in [ROOT / PACKAGE, *(ROOT / PACKAGE).rglob("*/")]:
        subfolders = [child for child in folder.iterdir() if (child / "__init__.py").exists()]
        if folder.is_dir() and subfolders:
            assert len(list(folder.glob("*.py"))) <= 10, folder


def test_the_module_map_names_every_module():
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = re.search(r"^## Module map$(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1]
    by_folder: dict[str, str] = {}
    folder = ""
    for line in section.splitlines():
        if start := re.match(r"\* `([\w/]+/)`", line):
            folder = start[1].removeprefix(f"{PACKAGE}/")
        by_folder[folder] = by_folder.get(folder, "") + line
    for path in modules(ROOT).values():
        if path.name == "__init__.py":
            continue
        inside = path.relative_to(ROOT / PACKAGE)
        where = "" if inside.parent == Path(".") else f"{inside.parent}/"
        assert f"`{path.name}`" in by_folder.get(where, ""), f"the module map lacks {inside}"
    for folder, lines in by_folder.items():
        for name in re.findall(r"`(\w+\.py)`", lines):
            assert (ROOT / PACKAGE / folder / name).is_file(), (
                f"the module map names {folder}{name}, which is not there"
            )
