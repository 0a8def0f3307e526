"""Miniature study: does token-level reward regularisation credit the right tokens, on a task with known ground truth?

    make study                       or:   python -m studies.miniature.run
    python -m studies.miniature.run --smoke         # every step in minutes, with meaningless figures

Trains several references from scratch, creates on-policy pairs with each, searches each method's settings on
development prompts, records the choices, and only then answers test prompts. docs/STUDY.md is written from the results.
After an interruption the same command continues where it stopped. Results are deterministic to the bit.
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
from collections.abc import Callable, Iterable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import IO  # noqa: E402

from studies.miniature import measure, pipeline  # noqa: E402
from studies.miniature.configuration import HERE, Reference, Run, Study, load_study, streams_of  # noqa: E402
from studies.miniature.warm import run_jobs, warm_up  # noqa: E402
from treg_megatron.errors import UserError  # noqa: E402
from treg_megatron.utils import entry  # noqa: E402
from treg_megatron.utils.files import atomic_write  # noqa: E402

ORACLE_METHOD = "dpo"  # the method that the frozen policy was trained by


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
        UserError: the run folder belongs to a study with another world, references or recipe, or is in use.
    """
    lock, started = begin(study), time.monotonic()
    warm_up()
    references = study.references
    say("world and references")
    pipeline.write_world(study)
    run_jobs({each.name: functools.partial(prepare, each) for each in references}, processes, "reference")
    say("search on development prompts")
    by_oracle = {method for method, keys in study.methods.items() if streams_of(keys) == pipeline.ORACLE}
    search = [(each, run) for each in references for run in each.search_runs]
    measure_all(study, [(each, run) for each, run in search if run.method not in by_oracle], "dev", processes)
    if by_oracle:
        run_jobs({each.name: functools.partial(ask_oracle, each) for each in references}, processes, "frozen policy")
        measure_all(study, search, "dev", processes)
    choices = {each.name: choose(each) for each in references}
    say("test prompts")
    run_jobs({each.name: functools.partial(pipeline.make_pairs, each, "test") for each in references}, processes, "set")
    final = [(each, run) for each in references for run in each.final_runs(choices[each.name])]
    # seed by seed: an interrupted study then lacks seeds, not methods or references
    measure_all(study, sorted(final, key=lambda pair: pair[1].seed), "test", processes)
    from studies.miniature.report import write_report

    print(f"wrote {write_report(study, choices)}, {(time.monotonic() - started) / 60:.0f} min after the start")
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
            f"the world, the references or the recipe have changed since {study.run} was started; start over with: "
            "make study ARGS=--fresh"
        )
    return lock


def prepare(reference: Reference) -> None:
    """Train a reference, and make its training and development pairs."""
    pipeline.train_reference(reference)
    for split in ("train", "dev"):
        pipeline.make_pairs(reference, split)
    pipeline.index_training_pairs(reference)


def ask_oracle(reference: Reference) -> None:
    """Label the training pairs by the best run of plain DPO."""
    setting = best_setting(reference, ORACLE_METHOD)
    pipeline.make_oracle_rewards(reference, reference.of(ORACLE_METHOD, setting, reference.study.search_seed))


def measure_all(study: Study, runs: Iterable[tuple[Reference, Run]], split: str, processes: int) -> None:
    """Train and measure every run without a result on a split, and measure the references."""
    jobs: dict[str, Callable[[], None]] = {}
    for reference in study.references:
        if not pipeline.result_path(reference, pipeline.REFERENCE, split).exists():
            jobs[f"{reference.name} itself"] = functools.partial(pipeline.measure_reference, reference, split)
    for reference, run in runs:
        if not pipeline.result_path(reference, run.name, split).exists():
            jobs[f"{reference.name}/{run.name}"] = functools.partial(pipeline.train_and_measure, reference, run, split)
        else:  # what is left of a run that was interrupted after it was measured
            shutil.rmtree(pipeline.run_folder(reference, run), ignore_errors=True)
    run_jobs(jobs, processes, "run")


def choose(reference: Reference) -> dict[str, int]:
    """The best setting of each method, see :func:`best_setting`.

    The choice is made once and recorded in the reference's folder.

    Raises:
        UserError: the recorded choice is for other methods.
    """
    path = reference.folder / "choice.json"
    if not path.exists():
        choice = {method: best_setting(reference, method) for method in reference.study.methods}
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(choice, indent=2) + "\n", encoding="utf-8")
    choice = json.loads(path.read_text(encoding="utf-8"))
    if set(choice) != set(reference.study.methods):
        raise UserError(f"{path} was written for other methods; remove {reference.study.run}, or restore the methods")
    return choice


def best_setting(reference: Reference, method: str) -> int:
    """The setting of a method's search with the best mean score of sampled answers to development prompts."""
    scores = {
        run.setting: float(
            measure.load_arrays(pipeline.result_path(reference, run.name, "dev"))["sampled/score"].mean()
        )
        for run in reference.search_runs
        if run.method == method
    }
    return max(scores, key=scores.__getitem__)


def say(what: str) -> None:
    """Print a heading."""
    print(f"\n== {what}", flush=True)


if __name__ == "__main__":
    entry.run(main)
