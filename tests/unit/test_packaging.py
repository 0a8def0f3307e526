"""setup.py and the files of exact versions name the same packages, and never an unrelated one with a similar name."""

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
SETUP = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))


def constant(name):
    value = next(
        node.value
        for node in SETUP.body
        if isinstance(node, ast.Assign) and [target.id for target in node.targets] == [name]
    )
    return ast.literal_eval(value)


REQUIRED = [Requirement(line) for line in constant("REQUIRED")]
EXTRAS = {extra: [Requirement(line) for line in lines] for extra, lines in constant("EXTRAS").items()}
PINNED = ["constraints.txt", *sorted(f"constraints/{path.name}" for path in (ROOT / "constraints").glob("*.txt"))]


def pin_lines(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if not line.startswith("#")]


def pins(name: str) -> dict[str, str]:
    """Package -> version, of a file of exact versions."""
    return dict(line.split("==") for line in pin_lines(name))


def test_no_package_named_apex_is_ever_installed():
    """PyPI's apex is a Pyramid toolkit; NVIDIA's comes from its containers or from source."""
    required = [canonicalize_name(r.name) for r in sum(EXTRAS.values(), REQUIRED)]
    assert "apex" not in required and not any("apex" in pins(name) for name in PINNED)


@pytest.mark.parametrize("name", PINNED)
def test_every_requirement_has_a_pin_that_it_allows(name):
    for requirement in REQUIRED + EXTRAS["dev"]:
        pin = pins(name).get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} has no pin in {name}"
        assert requirement.specifier.contains(pin), f"the pin {requirement.name}=={pin} is against {requirement}"


@pytest.mark.parametrize("name", PINNED)
def test_pins_are_exact_public_versions_in_order(name):
    lines = pin_lines(name)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9-]*==[0-9][0-9a-z.]*", line) for line in lines)
    assert lines == sorted(lines) and len(pins(name)) == len(lines)
    local = [pin for pin in pins(name).values() if Version(pin).local]
    assert not local, "a local tag such as +cpu exists on one index only"


def test_no_file_names_an_index_of_its_own():
    for name in ("setup.py", *PINNED, "Makefile", ".ci/run"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"--(extra-)?index-url|--find-links|\s-[if]\s+https?:", text), name


@pytest.mark.parametrize("name", PINNED)
def test_the_gpu_and_sampling_extras_stay_out_of_the_pinned_sets(name):
    """Transformer Engine is built on the GPU host, and vLLM brings its own torch."""
    assert pins(name).keys().isdisjoint(canonicalize_name(r.name) for r in EXTRAS["gpu"] + EXTRAS["sampling"])
