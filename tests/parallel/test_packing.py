"""Training with bins, on any number of ranks and after a kill, gives the losses of an unpacked run on one rank."""

import pytest

from tests.support.training import assert_same, records, run, run_and_kill

BINS = ["data.layout=bins", "data.bin_size=180"]  # a pair has 43 to 121 tokens, a global batch 1 to 3 bins
LAYOUTS = {
    "one rank": (1, BINS),
    "one bin per step": (1, ["data.layout=bins"]),
    "DP2": (2, BINS),
    "DP2 shared prompts": (2, [*BINS, "data.share_prompts=true"]),
    "PP2": (2, [*BINS, "parallel.pipeline=2"]),
    "TP2+SP": (2, [*BINS, "parallel.tensor=2", "parallel.sequence=true"]),
    "PP2+VPP2": (2, [*BINS, "parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "CP2xPP2+VPP2": (4, [*BINS, "parallel.context=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
}


@pytest.fixture(scope="module")
def padded(tied_run, tmp_path_factory):
    return run(tied_run, tmp_path_factory.mktemp("padded") / "out", 1, "data.layout=padded")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bins_give_the_losses_of_a_single_rank(layout, tied_run, padded, tmp_path):
    size, overrides = LAYOUTS[layout]
    out = run(tied_run, tmp_path / "out", size, *overrides)
    for validation in (False, True):
        found, expected = records(out, validation), records(padded, validation)
        assert [r["step"] for r in found] == [r["step"] for r in expected]
        name = "validation/loss" if validation else "loss"
        assert_same([r[name] for r in found], [r[name] for r in expected], rtol=1e-5)
    assert_same([r["grad_norm"] for r in records(out)], [r["grad_norm"] for r in records(padded)], rtol=1e-4)


@pytest.mark.parametrize("layout", ["DP2", "PP2+VPP2"])
def test_a_killed_run_with_bins_resumes_on_two_ranks(layout, tied_run, padded, tmp_path):
    out = tmp_path / "out"
    run_and_kill(tied_run, out, 1, 8, "train.save_every=7", *BINS)
    run(tied_run, out, 2, "train.save_every=7", *LAYOUTS[layout][1])
    assert "resuming from step_000007" in out.with_suffix(".log.0").read_text()
    assert_same([r["loss"] for r in records(out)], [r["loss"] for r in records(padded)], rtol=1e-5)


def test_a_pair_longer_than_a_bin_is_named(tied_run, tmp_path):
    with pytest.raises(AssertionError, match="pair [0-9]+ has [0-9]+ tokens in both sequences, more than data"):
        run(tied_run, tmp_path / "out", 1, "data.layout=bins", "data.bin_size=30")
