"""The choice of kernels on a CPU, also if torch lacks a private operator."""

import pytest

from treg_megatron.errors import UserError
from treg_megatron.kernels import kernels, private_operators
from treg_megatron.kernels.kernels import Kernels, cpu_kernels


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Run each test as in a new process: without the variable and with empty caches."""
    monkeypatch.delenv("TREG_CPU_KERNELS", raising=False)
    for cached in (private_operators.unusable_operator, kernels._log_unusable):
        cached.cache_clear()
    yield
    for cached in (private_operators.unusable_operator, kernels._log_unusable):
        cached.cache_clear()


@pytest.fixture
def logged(monkeypatch):
    """Lines that the module logs, independent of logging changes in other tests."""
    lines = []
    monkeypatch.setattr(kernels._log, "warning", lambda message, *args: lines.append(message % args))
    return lines


@pytest.mark.parametrize("value", [None, "", "fast"])
def test_fast_by_default(value, monkeypatch, logged):
    if value is not None:
        monkeypatch.setenv("TREG_CPU_KERNELS", value)
    assert cpu_kernels() == Kernels.fast_cpu() != Kernels.reference()
    assert logged == []


def test_reference_on_request(monkeypatch):
    monkeypatch.setenv("TREG_CPU_KERNELS", "reference")
    assert cpu_kernels() == Kernels.reference()


def test_another_name_is_refused(monkeypatch):
    monkeypatch.setenv("TREG_CPU_KERNELS", "faster")
    with pytest.raises(UserError, match="^TREG_CPU_KERNELS=faster: choose one of fast, reference$"):
        cpu_kernels()


@pytest.mark.parametrize("operator", private_operators.OPERATORS | private_operators.ONEDNN, ids=lambda o: o[1])
def test_reference_where_an_operator_is_missing(operator, monkeypatch, logged):
    monkeypatch.setattr(private_operators, "mkl_is_slow", lambda: True)
    found = private_operators.arguments_of
    monkeypatch.setattr(private_operators, "arguments_of", lambda *o: None if o == operator else found(*o))
    assert cpu_kernels() == cpu_kernels() == Kernels.reference()
    [line] = logged
    assert f"{operator[0]}::{operator[1]} is missing; the CPU runs the reference kernels" in line


@pytest.mark.parametrize("change", [lambda found: found[1:], lambda found: found + found[:1]], ids=["fewer", "more"])
def test_reference_where_an_operator_takes_other_arguments(change, monkeypatch, logged):
    found = private_operators.arguments_of
    monkeypatch.setattr(private_operators, "arguments_of", lambda *o: change(found(*o)))
    assert cpu_kernels() == Kernels.reference()
    [line] = logged
    assert " takes " in line and " instead of query, key" in line


def test_an_operator_that_does_not_exist_is_found_missing():
    assert private_operators.arguments_of("aten", "no_such_operator", "default") is None
    assert private_operators.arguments_of("aten", "silu_backward", "no_such_overload") is None
