"""Preflight's predictions against measurements on real ranks, with Megatron's schedule over gloo."""

import pytest

from tests.support.forked import run_ranks
from tests.support.preflight_ranks import LAYOUTS, MODELS, measure_on_this_rank, predict_in_this_process

CASES = [
    ("tiny", layout, "fp32", recompute) for layout in LAYOUTS for recompute in ("none", "full") if "3" not in layout
]
CASES += [
    ("56M", "TP1", "fp32", "none"),
    ("56M", "TP2xPP2", "fp32", "full"),
    ("tiny", "PP2", "bf16", "none"),
    ("tiny", "TP2+SP", "bf16", "selective"),
    ("tiny", "TP1", "fp32", "selective"),
]


@pytest.mark.parametrize("model, layout, precision, recompute", CASES, ids=lambda value: value)
def test_predictions_equal_measurements_on_real_ranks(model, layout, precision, recompute):
    case = (MODELS[model], layout, precision, recompute)
    measured = run_ranks(LAYOUTS[layout][0], measure_on_this_rank, *case)
    predicted = run_ranks(1, predict_in_this_process, *case)[0]
    for real, found in zip(measured, predicted, strict=True):
        assert real[:4] == found[:4], "weights, gradients, main parameters and optimizer state are exact"
        assert real.peak == pytest.approx(found.peak, rel=0.1)
