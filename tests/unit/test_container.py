"""The image's recipe: NeMo's own requirements hold all that the package needs, except what the recipe installs.

The requirements are those of the installed NeMo, so that `make test-stack` looks at each set's.
"""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.unit.test_packaging import REQUIRED, ROOT, pins
from treg_megatron.distributed import stack

pytestmark = pytest.mark.slow

#: what an image of NeMo is installed with
EXTRAS = {"lightning", "llm", "run"}
IMAGES = ("container/Dockerfile", "container/treg.def")
#: built by NVIDIA into every image of NeMo, and imported only where it is there
OF_THE_IMAGE = {"transformer_engine"}


def load_check_imports():
    spec = importlib.util.spec_from_file_location("check_imports", ROOT / "container" / "check_imports.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check_imports = load_check_imports()
MODULES = check_imports.third_party_modules(ROOT / "treg_megatron")


def required_by(package: str, extras: set[str]) -> set[str]:
    """A package and all that it requires, directly or not, as far as that is installed here."""
    found, waiting = set(), [(package, frozenset(extras))]
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in found:
            continue
        found.add((name, wanted))
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, lines):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted | {""}):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return {name for name, _ in found}


def installed_by(image: str) -> set[str]:
    """Packages other than the project that an image's recipe installs."""
    (line,) = re.findall(r"pip install (.+)", (ROOT / image).read_text(encoding="utf-8"))
    options = {word for word in line.split() if word.startswith("-")}
    assert options == {"--no-cache-dir", "--no-deps"}, "anything else could replace NVIDIA's builds"
    *others, project = [word for word in line.split() if not word.startswith("-")]
    assert project == "/opt/treg-megatron"
    assert all(pins("constraints.txt")[name] == version for name, version in (word.split("==") for word in others))
    return {word.split("==")[0] for word in others}


@pytest.mark.parametrize("image", IMAGES)
def test_the_image_installs_exactly_what_nemo_does_not_require(image):
    nemo = required_by("nemo-toolkit", EXTRAS)
    packages = importlib.metadata.packages_distributions()
    names = {module.partition(".")[0] for module in MODULES} - OF_THE_IMAGE
    imported = {canonicalize_name(packages[name][0]) for name in names}
    needed = imported | {canonicalize_name(requirement.name) for requirement in REQUIRED}
    assert needed - nemo - {"nemo-toolkit"} == installed_by(image)


@pytest.mark.parametrize("image", IMAGES)
def test_every_file_that_the_image_copies_exists_and_the_check_is_run(image):
    text = (ROOT / image).read_text(encoding="utf-8")
    copied = re.findall(r"^(?:COPY |    (?!python))((?:[\w./]+ )+)/opt/treg-megatron", text, re.MULTILINE)
    names = {name for group in copied for name in group.split()}
    assert {"setup.py", "README.md", "treg_megatron", "recipes"} <= names
    assert all((ROOT / name).exists() for name in names)
    assert re.search(r"^\s*(RUN )?python /opt/treg-megatron/container/check_imports\.py$", text, re.MULTILINE)


def test_a_missing_module_is_named(monkeypatch):
    assert {"torch", "shtab", "datasets", "nemo.lightning.pytorch.optim"} <= set(MODULES) and "vllm" not in MODULES
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert list(check_imports.missing(["json", "shtab"])) == ["shtab"]


def test_a_driver_that_only_gpu_nodes_have_is_not_missing(tmp_path, monkeypatch):
    text = "raise ImportError('libcuda.so.1: cannot open shared object file')"
    Path(tmp_path / "needs_driver.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert check_imports.missing(["needs_driver"]) == {}


def test_python_of_an_apptainer_image(tmp_path):
    (tmp_path / "apptainer").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    (tmp_path / "apptainer").chmod(0o755)
    script = [ROOT / "container" / "apptainer_python.sh", "-m", "treg_megatron.train", "run=/r with space"]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TREG": "/clone"}
    without = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert without.returncode == 2 and without.stderr.startswith("error: APPTAINER_IMAGE names no image")
    environment["APPTAINER_IMAGE"] = "/images/treg.sif"
    done = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    options = ["exec", "--nv", "--bind", f"/clone,{tmp_path}", "--pwd", str(tmp_path)]
    assert done.stdout.splitlines() == [
        *options,
        "/images/treg.sif",
        "python",
        "-m",
        "treg_megatron.train",
        "run=/r with space",
    ]


def test_every_container_that_is_named_is_a_supported_one():
    """The Dockerfile, the documentation and the site file name no container that a run would refuse."""
    tags = {one.source.rpartition(":")[2] for one in stack.SUPPORTED if ":" in one.source}
    for name in ("container/Dockerfile", "container/treg.def", "slurm/site.example.sh", "docs/CLUSTER.md", "README.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        named = set(re.findall(r"nvidia/nemo:(\d[\w.]*\w)", text))
        assert named <= tags and (named or name == "README.md"), f"{name} names {named}"
