"""All supported sets of NeMo and megatron-core train the same: one short run, and checkpoints that change sets.

`make test-stack` runs this file on the set of a container. Every set is held against numbers that the default one gave;
`python -m tests.parallel.test_stacks` records them again.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from tests.parallel.test_preflight import PUBLISHED, preflight
from tests.support.forked import run_ranks
from tests.support.training import TinyRun, assert_same, make_run, records, run, run_and_kill, train_on_this_rank

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "tests" / "data" / "metrics_of_the_default_set.json"
COMPARED = ("loss", "grad_norm", "lr", "treg/token_reward_chosen")
#: a decay that moves the loss visibly, and a norm that most steps exceed
OVERRIDES = ["optimizer.weight_decay=1", "optimizer.clip_grad=0.5", "data.validation=null", "train.save_every=4"]
FOUR_RANKS = ["parallel.tensor=2", "parallel.pipeline=2"]


def compared(output: Path) -> dict[str, list[float]]:
    return {name: [record[name] for record in records(output)] for name in COMPARED}


def assert_as_recorded(output: Path) -> None:
    """Equal to what the default set computed on one rank, within what another layout may change."""
    found, expected = compared(output), json.loads(RECORDED.read_text(encoding="utf-8"))
    for name in COMPARED:
        rtol = 1e-5 if name in ("loss", "lr") else 1e-3
        assert_same(found[name], expected[name], rtol=rtol)


@pytest.fixture(scope="module")
def single(tied_run, tmp_path_factory) -> Path:
    return run(tied_run, tmp_path_factory.mktemp("single") / "out", 1, *OVERRIDES)


def test_a_run_has_the_metrics_of_the_default_set(single):
    assert_as_recorded(single)


def test_decay_and_clipping_matter_in_the_recorded_run(single, tied_run, tmp_path):
    """Otherwise equal metrics would say nothing about either."""
    assert max(r["grad_norm"] for r in records(single)) > 0.5
    for changed in ("optimizer.weight_decay=0", "optimizer.clip_grad=5"):
        with pytest.raises(AssertionError):
            assert_as_recorded(run(tied_run, tmp_path / changed, 1, *OVERRIDES, changed))


def test_another_layout_killed_and_resumed_and_exported(single, tied_run, tmp_path):
    from transformers import AutoModelForCausalLM

    from treg_megatron.checkpoint.to_hf import export_checkpoint

    out = tmp_path / "out"
    run_and_kill(tied_run, out, 4, 6, *OVERRIDES, *FOUR_RANKS)
    run(tied_run, out, 4, *OVERRIDES, *FOUR_RANKS)
    assert "resuming from step_000004" in out.with_suffix(".log.0").read_text()
    assert_as_recorded(out)
    exported = []
    for folder in (single, out):
        export_checkpoint(folder / "checkpoints" / "step_000020", tied_run.hf, tmp_path / f"{folder.parent.name}.hf")
        exported.append(AutoModelForCausalLM.from_pretrained(tmp_path / f"{folder.parent.name}.hf").state_dict())
    for name, tensor in exported[0].items():
        torch.testing.assert_close(exported[1][name], tensor, rtol=1e-3, atol=1e-4)


def test_preflight_of_the_70b_recipe():
    done = preflight("llama3_70b")
    assert done.code == 0 and f"{PUBLISHED['llama3_70b']:,} parameters" in done.printed, done.printed


def decay_of_parameters(recipe: Path, overrides: list[str]) -> dict[str, float]:
    """Parameter name -> weight decay in the optimizer of a run, read when its first step has ended."""
    from treg_megatron.training.callbacks import metrics

    found: dict[str, float] = {}
    end_of_batch = metrics.RunMetrics.on_train_batch_end

    def read(self, trainer, module, *rest) -> None:
        names = {parameter: name for name, parameter in module.named_parameters()}
        for optimizer in trainer.optimizers[0].mcore_optimizer.chained_optimizers:
            for parameter, (group, _) in optimizer.model_param_group_index_map.items():
                found[names[parameter]] = optimizer.optimizer.param_groups[group]["weight_decay"]
        end_of_batch(self, trainer, module, *rest)

    metrics.RunMetrics.on_train_batch_end = read
    train_on_this_rank(recipe, overrides)
    return found


def test_weights_decay_and_norms_do_not(tied_run, tmp_path):
    sections = tied_run.sections(tmp_path / "out", *OVERRIDES, "train.max_steps=1")
    (decay,) = run_ranks(1, decay_of_parameters, tied_run.recipe, sections, log=tmp_path / "log")
    norms = {name for name in decay if "norm" in name}
    assert norms and norms < decay.keys()
    assert {name: value for name, value in decay.items() if value != (0.0 if name in norms else 1.0)} == {}


# -- checkpoints of one set on another


@pytest.fixture
def other_python() -> str:
    if "TREG_OTHER_PYTHON" not in os.environ:
        pytest.skip("TREG_OTHER_PYTHON names no interpreter of another set (make test-stack)")
    return os.environ["TREG_OTHER_PYTHON"]


def train_elsewhere(python: str, files: TinyRun, output: Path, stop_after: int | None = None) -> str:
    """Train on one rank of another set, up to a step if one is given; returns the log."""
    overrides = files.sections(output, "data.epochs=4", "train.max_steps=20", *OVERRIDES)
    command = [python, "-m", "treg_megatron.train", "--recipe", str(files.recipe), *overrides]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(output.with_suffix(".elsewhere"), "w+", encoding="utf-8") as log:
        job = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        if stop_after:
            metrics = output / "metrics.jsonl"
            while job.poll() is None and not (metrics.exists() and f'"step": {stop_after},' in metrics.read_text()):
                time.sleep(0.002)
            job.send_signal(signal.SIGUSR1)
        code = job.wait(timeout=280)
        log.seek(0)
        text = log.read()
    assert code == (85 if stop_after else 0), text
    return text


def stopped_early(recipe: Path, overrides: list[str]) -> None:
    """Train until the step after 5, save, and end as after SIGUSR1."""
    from treg_megatron.training.callbacks import metrics

    end_of_batch = metrics.RunMetrics.on_train_batch_end

    def stop_at(self, trainer, *rest) -> None:
        end_of_batch(self, trainer, *rest)
        if trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGUSR1)

    metrics.RunMetrics.on_train_batch_end = stop_at
    with pytest.raises(SystemExit):
        train_on_this_rank(recipe, overrides)


def test_this_set_resumes_a_checkpoint_of_the_other(other_python, tied_run, tmp_path):
    out = tmp_path / "out"
    train_elsewhere(other_python, tied_run, out, stop_after=5)
    run(tied_run, out, 2, *OVERRIDES, "parallel.pipeline=2")
    assert "resuming from" in out.with_suffix(".log.0").read_text()
    assert_as_recorded(out)


def test_the_other_set_resumes_a_checkpoint_of_this_one(other_python, tied_run, tmp_path):
    out = tmp_path / "out"
    sections = tied_run.sections(out, "data.epochs=4", "train.max_steps=20", *OVERRIDES, "parallel.pipeline=2")
    run_ranks(2, stopped_early, tied_run.recipe, sections, log=out.with_suffix(".log"))
    assert "resuming from" in train_elsewhere(other_python, tied_run, out)
    assert_as_recorded(out)


if __name__ == "__main__":
    from tests.support.forked import warm_up

    warm_up()
    with tempfile.TemporaryDirectory() as scratch:
        files = make_run(Path(scratch), tied=True)
        numbers = compared(run(files, Path(scratch) / "out", 1, *OVERRIDES))
    RECORDED.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    sys.exit(0)
