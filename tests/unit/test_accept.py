"""Acceptance: a check that crashes or hangs hides nothing, and the card says what ran."""

import dataclasses
import json
import signal
from types import SimpleNamespace

import pytest
import torch

from treg_megatron.accept import checks, run
from treg_megatron.accept.card import write_card
from treg_megatron.accept.check import (
    FAIL,
    NOT_RUN,
    PASS,
    Check,
    Failed,
    Machine,
    NotRun,
    Result,
    _error_in,
    run_python,
)
from treg_megatron.accept.inputs import WideRun, wide_config
from treg_megatron.accept.numerics import TOLERANCE, error_of
from treg_megatron.errors import UserError

pytestmark = pytest.mark.slow

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


def test_memory_far_from_the_prediction_is_found():
    assert checks.compare_memory(0.9e9, 1e9) == pytest.approx(0.9)
    with pytest.raises(Failed, match=r"^1\.10 GB were allocated, preflight predicts 1\.00; 1\.10 of it"):
        checks.compare_memory(1.1e9, 1e9)
    with pytest.raises(Failed, match=r"0\.50 of it, allowed 0\.8 to 1\.08$"):
        checks.compare_memory(0.5e9, 1e9)


def test_the_wide_model_is_as_deep_as_memory_allows():
    assert wide_config(80e9)["num_hidden_layers"] == 4 and wide_config(40e9)["num_hidden_layers"] == 2
    assert wide_config(40e9)["hidden_size"] == 4096
    with pytest.raises(NotRun, match="^needs a GPU with 36 GB of memory, here are 24$"):
        wide_config(24e9)


def test_rates_of_a_known_and_of_an_unknown_gpu():
    wide = WideRun(wide_config(80e9), length=2048, pairs=8, overrides=[])
    figures = {name: value for name, value, _ in checks.rates(wide, 2.0, 2, "NVIDIA H100 80GB HBM3")}
    assert (figures["tokens"], figures["pairs"]) == (2 * 2048 * 8 / 2, 4)
    # 6 per weight and token of four layers and the head; in attention 12 per visible pair, head and channel
    weights, tokens = 4 * (4096 * 128 * (2 * 32 + 2 * 8) + 3 * 4096 * 14336) + 4096 * 128256 * 2047 / 2048, 2048 * 16
    flops = 6 * weights * tokens + 12 * 4 * 32 * 128 * 2048**2 / 2 * 16
    assert figures["rate"] == pytest.approx(flops / 2 / 2 / 1e12)
    assert figures["MFU"] == pytest.approx(figures["rate"] / 989)
    assert "MFU" not in [name for name, *_ in checks.rates(wide, 2.0, 2, "NVIDIA RTX 4090")]


def test_a_check_that_is_not_run_may_say_something(tmp_path, monkeypatch):
    def partly(folder, machine):
        raise NotRun("needs a GPU", [("predicted", 2.0, "GB")])

    said = []
    monkeypatch.setattr(run, "CHECKS", [Check("partly", "?", partly)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("TREG_CPU_DEVICES", "")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    run._answer("partly", tmp_path, MACHINE, SimpleNamespace(send=said.append))
    assert said == [(NOT_RUN, "needs a GPU", [("predicted", 2.0, "GB")])]


def test_the_error_of_a_rank_is_its_cause():
    lines = ["[rank0]: a.b.DeviceFault: here", "[rank1]: RuntimeError: Connection closed by peer [::1]:1", "x"]
    assert _error_in("\n".join([*lines, "torch.elastic.ChildFailedError:", "====="])) == lines[0]
    assert _error_in("\n".join([*lines, "error: ours"])) == "error: ours"
    assert _error_in("torch.elastic.ChildFailedError:") == "torch.elastic.ChildFailedError:"


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
