"""Acceptance: a check that crashes or hangs hides nothing, and the card says what ran."""

import dataclasses
import json

import pytest
import torch

from treg_megatron.accept import checks, run
from treg_megatron.accept.card import write_card
from treg_megatron.accept.check import FAIL, NOT_RUN, PASS, Check, Failed, Machine, Result, run_python
from treg_megatron.accept.numerics import TOLERANCE, error_of
from treg_megatron.errors import UserError

MACHINE = Machine(gpus=0, ranks=2)


def test_a_check_that_crashes_fails(tmp_path):
    result = run.asked(Check("no such check", "?", checks.head), tmp_path, MACHINE)
    assert (result.status, result.detail) == (FAIL, "the check ended with exit code 1")


def test_a_check_that_hangs_fails(tmp_path):
    check = next(check for check in checks.CHECKS if check.name == "head")
    result = run.asked(dataclasses.replace(check, seconds=0), tmp_path, MACHINE)
    assert (result.status, result.detail) == (FAIL, "no answer within 0 s")


def test_a_check_that_needs_more_ranks_is_not_run(tmp_path):
    check = next(check for check in checks.CHECKS if check.name == "train TP2xPP2")
    result = run.asked(check, tmp_path, MACHINE)
    assert (result.status, result.detail) == (NOT_RUN, "needs 4 ranks, here are 2")


def test_losses_that_differ_are_found():
    expected = checks.expected_losses()
    assert len(expected) == 6 and checks._compare(expected, 0) == 0
    wrong = [*expected[:2], expected[2] * 1.001, *expected[3:]]
    with pytest.raises(Failed, match="the loss of step 3 is .*1.0e-03 of it, allowed 0.0001"):
        checks._compare(wrong, 1e-4)
    with pytest.raises(Failed, match="5 steps are recorded, not 6"):
        checks._compare(expected[:5], 1e-4)
    with pytest.raises(Failed, match="the loss of step 1 is nan"):
        checks._compare([float("nan"), *expected[1:]], 1e-4)


def test_the_error_of_a_program_is_named(tmp_path):
    with pytest.raises(Failed, match="^ValueError: too large$"):
        run_python(tmp_path / "log", "-c", "raise ValueError('too large')")
    with pytest.raises(Failed, match="hidden for this check"):
        run_python(tmp_path / "log2", "-c", "import json5000", hide=["json5000"])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_head_is_within_its_tolerance(dtype):
    assert error_of(dtype, "cpu") <= TOLERANCE[dtype]
    assert error_of(torch.bfloat16, "cpu") > TOLERANCE[torch.float32], "the tolerance tells precisions apart"


def test_the_card(tmp_path):
    results = [
        Result("a", "?", PASS, seconds=3, figures=[("rate", 2.5, "GB/s")]),
        Result("b", "?", FAIL, "x | y"),
        Result("c", "?", NOT_RUN, "needs a GPU"),
    ]
    write_card(tmp_path, MACHINE, results, finished=False)
    text = (tmp_path / "acceptance.md").read_text()
    assert "1 PASS, 1 FAIL, 1 not run; still running" in text
    assert "| a | ? | PASS | rate 2.5 GB/s | 3 |" in text and "FAIL: x \\| y" in text
    card = json.loads((tmp_path / "acceptance.json").read_text())
    assert card["about"]["torch"] == torch.__version__ and [c["status"] for c in card["checks"]] == [
        PASS,
        FAIL,
        NOT_RUN,
    ]


def test_what_cannot_be_asked(tmp_path):
    with pytest.raises(UserError, match="no check 'nonsense'; known: inputs, collectives"):
        run.accept(tmp_path / "new", True, ["nonsense"])
    with pytest.raises(UserError, match="already exists"):
        run.accept(tmp_path, True, ["head"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no GPU"):
            run.accept(tmp_path / "new", False)
