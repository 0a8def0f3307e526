"""Miniature study: does token-level reward regularisation credit the right tokens, on a task with known ground truth?

    make study                       or:   python -m studies.miniature.run
    python -m studies.miniature.run --smoke         # every step in three minutes, with meaningless figures

Trains a reference from scratch, creates on-policy pairs with it, searches each method's settings on development
prompts, records the choice, and only then answers test prompts. docs/STUDY.md is written from the results. After an
interruption the same command continues where it stopped. Results are deterministic to the bit.
"""

import os

# set before torch is imported anywhere: one thread and one device give a fixed order of summation
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import argparse  # noqa: E402
import fcntl  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402
import shutil  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import IO  # noqa: E402

import numpy as np  # noqa: E402

from studies.miniature import measure, pipeline  # noqa: E402
from studies.miniature.configuration import HERE, Run, Study, load_study  # noqa: E402
from studies.miniature.warm import run_jobs, warm_up  # noqa: E402
from treg_megatron.errors import UserError  # noqa: E402
from treg_megatron.utils import entry  # noqa: E402
from treg_megatron.utils.files import atomic_write  # noqa: E402


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m studies.miniature.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--study", type=Path, default=HERE / "study.yaml", metavar="YAML", help="another study.yaml")
    parser.add_argument("--smoke", action="store_true", help="the small study of smoke.yaml")
    parser.add_argument("--fresh", action="store_true", help="delete the output of an earlier study and start over")
    parser.add_argument("--processes", type=int, metavar="N", help="runs at a time (default: the study's)")
    arguments = parser.parse_args(argv)
    study = load_study(HERE / "smoke.yaml" if arguments.smoke else arguments.study)
    if arguments.fresh and study.run.exists():
        shutil.rmtree(study.run)
    conduct(study, arguments.processes or study.processes)


def conduct(study: Study, processes: int) -> None:
    """Run all steps in order; finished ones are skipped.

    Raises:
        UserError: the run folder belongs to a study with another world, reference or recipe, or is in use.
    """
    lock, started = begin(study), time.monotonic()
    warm_up()
    say("world and reference")
    if not (study.run / "megatron").exists():
        pipeline.write_world(study)
        pipeline.train_reference(study)
    run_jobs(pair_jobs(study, "train", "dev"), processes, "step")
    pipeline.index_training_pairs(study)
    say("search on development prompts")
    measure_all(study, study.search_runs, "dev", processes)
    choice = choose(study)
    say("test prompts: " + ", ".join(f"{method} setting {setting}" for method, setting in choice.items()))
    run_jobs(pair_jobs(study, "test"), processes, "step")
    measure_all(study, study.final_runs(choice), "test", processes)
    from studies.miniature.report import write_report

    print(f"wrote {write_report(study, choice)}, {(time.monotonic() - started) / 60:.0f} min after the start")
    lock.close()


def begin(study: Study) -> IO[str]:
    """Claim the run folder for this study, or check that it is this study's; return the lock, which children share.

    Raises:
        UserError: see :func:`conduct`.
    """
    study.run.mkdir(parents=True, exist_ok=True)
    lock = open(study.run / "lock", "w", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"a study is running in {study.run}, perhaps the last runs of one that was stopped: wait for it to end"
        ) from None
    path = study.run / "study.json"
    if not path.exists():
        with atomic_write(path) as partial:
            partial.write_text(json.dumps({"digest": study.digest}) + "\n", encoding="utf-8")
    elif json.loads(path.read_text(encoding="utf-8"))["digest"] != study.digest:
        raise UserError(
            f"the world, the reference or the recipe has changed since {study.run} was started; start over with: "
            "make study ARGS=--fresh"
        )
    return lock


def pair_jobs(study: Study, *splits: str) -> dict[str, Callable[[], None]]:
    """Jobs that create the pairs of the given splits, by name."""
    return {f"pairs of {split}": functools.partial(pipeline.make_pairs, study, split) for split in splits}


def measure_all(study: Study, runs: list[Run], split: str, processes: int) -> None:
    """Train and measure every run without a result on a split, and measure the reference."""
    jobs = (
        {}
        if pipeline.result_path(study, pipeline.REFERENCE, split).exists()
        else {pipeline.REFERENCE: functools.partial(pipeline.measure_reference, study, split)}
    )
    jobs |= {
        run.name: functools.partial(pipeline.train_and_measure, study, run, split)
        for run in runs
        if not pipeline.result_path(study, run.name, split).exists()
    }
    run_jobs(jobs, processes, "run")


def choose(study: Study) -> dict[str, int]:
    """The setting of each method with the best mean score of sampled answers to development prompts.

    The choice is made once and recorded in the run folder.

    Raises:
        UserError: the recorded choice is for other methods.
    """
    path = study.run / "choice.json"
    if not path.exists():
        scores: dict[str, dict[int, float]] = {}
        for run in study.search_runs:
            result = measure.load_arrays(pipeline.result_path(study, run.name, "dev"))
            scores.setdefault(run.method, {})[run.setting] = float(np.mean(result["sampled/score"]))
        with atomic_write(path) as partial:
            partial.write_text(
                json.dumps({method: max(found, key=found.get) for method, found in scores.items()}, indent=2) + "\n",
                encoding="utf-8",
            )
    choice = json.loads(path.read_text(encoding="utf-8"))
    if set(choice) != set(study.methods):
        raise UserError(f"{path} was written for other methods; remove {study.run}, or restore the methods")
    return choice


def say(what: str) -> None:
    """Print a heading."""
    print(f"\n== {what}", flush=True)


if __name__ == "__main__":
    entry.run(main)
