"""Pipeline stages know the shapes of what they receive: those that a neighbour would tell them, without being told."""

import pytest
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from tests.support.forked import run_ranks
from tests.support.training import RECIPE, TinyRun, records, train_on_this_rank
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.distributed.stage_shapes import KnownShapes, LookAhead, with_known_shapes
from treg_megatron.labelling.job import label

LAYOUTS = {
    "PP2": (2, []),
    "PP2 padded": (2, ["data.layout=padded", "data.micro_batch_size=2"]),
    "PP2 bins of shared prompts": (2, ["data.layout=bins", "data.bin_size=180", "data.share_prompts=true"]),
    "PP4": (4, ["parallel.pipeline=4"]),
    "CP2xPP2": (4, ["parallel.context=2"]),
    "TP2xPP2+SP": (4, ["parallel.tensor=2", "parallel.sequence=true"]),
}

ask = P2PCommunicator._communicate_shapes
know = KnownShapes._communicate_shapes


def asked_as_well(function, *args) -> set[tuple]:
    """Call a function while each stage also asks its neighbours; the shapes that were the same, or an error."""
    same = set()

    def both(self, send_next, send_prev, recv_prev, recv_next):
        known = know(self, send_next, send_prev, recv_prev, recv_next)
        told = ask(self, send_next, send_prev, recv_prev, recv_next)
        for ours, theirs, comes in zip(known, told, (recv_prev, recv_next)):
            if comes:
                assert ours == tuple(theirs)
                same.add(ours)
        return known

    KnownShapes._communicate_shapes = both
    function(*args)
    return same


def unable_to_ask(function, *args) -> None:
    """Call a function where a stage that asks fails."""

    def refused(*_):
        raise AssertionError("a stage asked its neighbour for a shape")

    P2PCommunicator._communicate_shapes = refused
    function(*args)


def training(files: TinyRun, output, *overrides: str) -> list[str]:
    return files.sections(output, "train.max_steps=3", "train.save_every=2", "parallel.pipeline=2", *overrides)


def labelling(files: TinyRun, output):
    overrides = [
        *files.overrides,
        f"label.pairs={files.hf.parent}/heldout.jsonl",
        f"label.output={output}",
        "label.engine=megatron",
        "label.pipeline=2",
        "label.batch_tokens=200",
    ]
    return section(load_recipe(RECIPE, overrides), "label")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stage_knows_what_it_would_be_told(layout, tied_run, tmp_path):
    size, overrides = LAYOUTS[layout]
    overrides = training(tied_run, tmp_path / "out", *overrides)
    for shapes in run_ranks(size, asked_as_well, train_on_this_rank, RECIPE, overrides, log=tmp_path / "log"):
        assert len(shapes) > 2, "rows of different lengths"


def test_a_stage_that_labels_knows_what_it_would_be_told(tied_run, tmp_path):
    job = labelling(tied_run, tmp_path / "labels")
    first, last = run_ranks(2, asked_as_well, label, job, log=tmp_path / "log")
    assert not first and len(last) > 2


def test_no_stage_asks_in_training_validating_and_resuming(tied_run, tmp_path):
    for steps in (3, 5):
        overrides = training(tied_run, tmp_path / "out", "data.epochs=4", f"train.max_steps={steps}")
        run_ranks(2, unable_to_ask, train_on_this_rank, RECIPE, overrides, log=tmp_path / "log")
    assert "resuming from step_000003" in (tmp_path / "log.0").read_text()
    assert [record["step"] for record in records(tmp_path / "out")] == [1, 2, 3, 4, 5]


def test_no_stage_asks_in_labelling(tied_run, tmp_path):
    run_ranks(2, unable_to_ask, label, labelling(tied_run, tmp_path / "labels"), log=tmp_path / "log")


def test_looking_ahead_takes_nothing():
    values = LookAhead(iter(range(3)))
    assert [values.peek(), values.peek(), next(values), next(values), values.peek()] == [0, 0, 0, 1, 2]
    assert list(values) == [2]
    with pytest.raises(StopIteration):
        values.peek()


def test_other_schedules_stay_as_they_are():
    for schedule in (schedules.forward_backward_no_pipelining, schedules.forward_backward_pipelining_with_interleaving):
        assert with_known_shapes(schedule) is schedule
