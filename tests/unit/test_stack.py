"""Which pairs of NeMo and megatron-core a run accepts, and that each has a file of exact versions."""

import pytest

from tests.unit.test_packaging import pins
from treg_megatron.distributed import stack
from treg_megatron.errors import UserError

#: what a set's file may pin differently than constraints.txt
OF_THE_SET = {"nemo-toolkit", "megatron-core", "nvidia-modelopt", "transformers", "tokenizers", "torchprofile"}


@pytest.mark.parametrize(
    "nemo, megatron_core, source",
    [
        ("2.7.3", "0.15.3", "constraints.txt"),
        ("2.6.0", "0.15.0", "nvcr.io/nvidia/nemo:25.11"),
        ("2.6.0rc1", "0.15.0rc8+3ef1ad2", "nvcr.io/nvidia/nemo:25.11"),
        ("2.7.0", "0.16.0", "nvcr.io/nvidia/nemo:26.02"),
        ("2.7.3", "0.16.1", "nvcr.io/nvidia/nemo:26.02"),
        ("2.6.0", "0.16.0", None),
        ("2.5.0", "0.14.0", None),
        ("2.7.3", "0.17.0", None),
        ("3.0.0", "0.16.1", None),
        ("2.70.0", "0.15.0", None),
    ],
)
def test_the_set_of_two_versions(nemo, megatron_core, source):
    found = stack.supported_set(nemo, megatron_core)
    assert (found and found.source) == source


@pytest.fixture
def installed(monkeypatch):
    """Function that makes other versions look installed."""
    return lambda versions: monkeypatch.setattr(stack, "_version", versions.get)


def test_another_pair_is_refused_in_one_line_that_names_the_containers(installed):
    installed({"nemo-toolkit": "2.6.0", "megatron-core": "0.17.1"})
    with pytest.raises(UserError, match=r"NeMo 2\.6\.0 with megatron-core 0\.17\.1 .*2\.7 with 0\.16") as error:
        stack.require_stack()
    assert "nvcr.io/nvidia/nemo:25.11 or 26.02" in str(error.value) and "\n" not in str(error.value)


def test_a_missing_package_is_named(installed):
    installed({"nemo-toolkit": "2.7.3"})
    with pytest.raises(UserError, match="^megatron-core is not installed: use the container"):
        stack.require_stack()


def test_the_log_says_which_set_runs(installed):
    installed({"nemo-toolkit": "2.7.0", "megatron-core": "0.16.0"})
    line = stack.describe_stack(stack.require_stack())
    assert "NeMo 2.7.0, megatron-core 0.16.0 (the set of nvcr.io/nvidia/nemo:26.02)" in line


@pytest.mark.parametrize("one", stack.SUPPORTED, ids=lambda one: one.constraints)
def test_a_set_has_a_file_that_pins_it_and_differs_from_the_default_only_there(one):
    found, default = pins(one.constraints), pins("constraints.txt")
    assert stack.supported_set(found["nemo-toolkit"], found["megatron-core"]) == one
    differ = {name for name in found.keys() | default.keys() if found.get(name) != default.get(name)}
    assert differ <= OF_THE_SET
    assert found["torch"] == default["torch"]
