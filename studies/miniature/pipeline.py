"""Steps of the study, run as commands of the public tools; finished steps are skipped."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from studies.miniature import data, measure, model, world
from studies.miniature.configuration import PROMPT_PAIR, RECIPE, ROOT, Run, Study
from studies.miniature.warm import step
from treg_megatron.errors import UserError
from treg_megatron.labelling.prompt_pair import load_prompt_pair

REFERENCE = "reference"


def write_world(study: Study) -> None:
    """Write the prompts of every split, the reference's training data and its random weights."""
    settings, reference = study.world, study.reference
    sizes = settings["prompts"]
    drawn = {**sizes, "train": max(sizes["train"], reference["tasks"])}
    tasks = world.splits(settings["seed"], drawn, settings["shares"])
    for split, size in sizes.items():
        data.write_records(study.run / "prompts" / f"{split}.jsonl", data.prompt_records(split, tasks[split][:size]))
    data.write_records(
        study.run / REFERENCE / "rows.jsonl",
        data.reference_records(
            tasks["train"][: reference["tasks"]], reference["examples"], load_prompt_pair(PROMPT_PAIR), settings["seed"]
        ),
    )
    model.write_model(study.run / REFERENCE / "random", **reference["model"])


def train_reference(study: Study) -> None:
    """Train the reference with the objective `sft`, export it, and import it again for the runs to start from."""
    folder = study.run / REFERENCE
    random, start, streams = folder / "random", folder / "random-megatron", folder / "streams"
    log = study.run / "logs" / f"{REFERENCE}.log"
    if not (folder / "hf").exists():
        _unless(
            start,
            "tools/convert_checkpoint.py",
            "import",
            *_recipe(study),
            "--hf",
            random,
            "--checkpoint",
            start,
            log=log,
        )
        _unless(
            streams.with_name("streams.manifest.json"),
            "tools/index_pairs.py",
            *_recipe(study),
            "--labelled",
            folder / "rows.jsonl",
            "--output",
            streams,
            "--tokenizer",
            random,
            log=log,
        )
        _launch(
            study.reference["ranks"],
            [
                "-m",
                "treg_megatron.train",
                *_recipe(study),
                *_overrides(
                    {
                        "model.hf": random,
                        "model.checkpoint": start,
                        "data.train": streams,
                        "train.output": folder / "train",
                        "objective.loss_type": "sft",
                        "objective.alpha": 0.0,
                        "train.save_every": 250,
                        **study.reference["settings"],
                    }
                ),
            ],
            log,
        )
        step(
            "tools/convert_checkpoint.py",
            "export",
            *_recipe(study),
            "--checkpoint",
            folder / "train",
            "--base",
            random,
            "--output",
            folder / "hf",
            log=log,
        )
    step("tools/convert_checkpoint.py", "import", *_recipe(study), log=log)


def make_pairs(study: Study, split: str) -> None:
    """Create on-policy pairs with token rewards (sample, rank, label), and the token set that credit is measured on."""
    run, log = study.run, study.run / "logs" / f"pairs-{split}.log"
    samples, pairs, labelled = run / "samples" / split, run / "pairs" / f"{split}.jsonl", run / "labelled" / split
    _unless(
        samples / "manifest.json",
        "tools/sample_responses.py",
        *_recipe(study),
        "--prompts",
        run / "prompts" / f"{split}.jsonl",
        "--output",
        samples,
        log=log,
    )
    _unless(pairs, "tools/rank_responses.py", *_recipe(study), "--samples", samples, "--output", pairs, log=log)
    _unless(
        labelled / "manifest.json",
        "tools/label_tokens.py",
        *_recipe(study),
        "--pairs",
        pairs,
        "--output",
        labelled,
        log=log,
    )
    measure.save_arrays(run / "credit" / f"{split}.npz", measure.credit_set(labelled, pairs))


def index_training_pairs(study: Study) -> None:
    """Index the training sets: one with the reference's token rewards, one with the verifier's marks instead."""
    run, log = study.run, study.run / "logs" / "streams.log"
    data.write_records(
        run / "pairs" / "truth.jsonl", data.truth_records(data.read_records(run / "pairs" / "train.jsonl"))
    )
    _unless(
        run / "labelled" / "truth.parquet",
        "tools/import_rewards.py",
        *_recipe(study),
        "--pairs",
        run / "pairs" / "truth.jsonl",
        "--output",
        run / "labelled" / "truth.parquet",
        log=log,
    )
    for streams, labelled in (("train", "train"), ("truth", "truth.parquet")):
        _unless(
            run / "streams" / f"{streams}.manifest.json",
            "tools/index_pairs.py",
            *_recipe(study),
            "--labelled",
            run / "labelled" / labelled,
            "--output",
            run / "streams" / streams,
            log=log,
        )


def result_path(study: Study, name: str, split: str) -> Path:
    """Path of the measurements of a run, or of the reference, on a split."""
    return study.run / "results" / f"{name}.{split}.npz"


def train_and_measure(study: Study, run: Run, split: str) -> None:
    """Train one run from the reference and measure it; checkpoints and answers are deleted afterwards."""
    folder, log = study.run / "runs" / run.name, study.run / "logs" / f"{run.name}.log"
    if not (folder / "hf").exists():
        step(
            "treg_megatron.train",
            *_recipe(study),
            *_overrides(run.overrides),
            f"train.output={folder / 'train'}",
            log=log,
        )
        step(
            "tools/convert_checkpoint.py",
            "export",
            *_recipe(study),
            "--checkpoint",
            folder / "train",
            "--output",
            folder / "hf",
            log=log,
        )
    measure_policy(study, run.name, folder, folder / "hf", split, measure.curves(folder / "train" / "metrics.jsonl"))
    shutil.rmtree(folder)


def measure_reference(study: Study, split: str) -> None:
    """Measure the reference itself."""
    measure_policy(study, REFERENCE, study.run / REFERENCE / split, study.run / REFERENCE / "hf", split, {})


def measure_policy(study: Study, name: str, folder: Path, hf: Path, split: str, more: dict[str, Any]) -> None:
    """Generate greedy and sampled answers to the prompts of a split, and save their measurements.

    Args:
        folder: folder for the answers.
        hf: the policy's Hugging Face folder.
        more: arrays to save with the measurements.
    """
    log, prompts = study.run / "logs" / f"{name}.log", study.run / "prompts" / f"{split}.jsonl"
    ways = {"greedy": {"sample.temperature": 0.0, "sample.seeds": [0]}, "sampled": study.measure["sampled"]}
    found: dict[str, Any] = dict(more)
    for way, settings in ways.items():
        _unless(
            folder / way / "manifest.json",
            "tools/sample_responses.py",
            *_recipe(study),
            *_overrides(settings),
            "--model",
            hf,
            "--prompts",
            prompts,
            "--output",
            folder / way,
            log=log,
        )
        found |= {f"{way}/{what}": values for what, values in measure.answers(folder / way).items()}
    labelled, credit = study.run / "labelled" / split, measure.load_arrays(study.run / "credit" / f"{split}.npz")
    found["kl"] = measure.divergence(hf, study.run / REFERENCE / "hf", folder / "sampled")
    found["implicit"] = measure.implicit_rewards(hf, labelled, credit)
    measure.save_arrays(result_path(study, name, split), found)


def _recipe(study: Study) -> list[str]:
    return ["--recipe", str(RECIPE), f"run={study.run}"]


def _overrides(settings: dict[str, Any]) -> list[str]:
    return [f"{name}={str(value).replace(' ', '')}" for name, value in settings.items()]


def _unless(output: Path, program: str, *arguments: object, log: Path) -> None:
    if not output.exists():
        step(program, *arguments, log=log)


def _launch(ranks: int, arguments: list[str], log: Path) -> None:
    with open(log, "a", encoding="utf-8") as file:
        code = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *arguments],
            cwd=ROOT,
            stdout=file,
            stderr=file,
        ).returncode
    if code:
        raise UserError(
            f"the reference's training failed with exit code {code}, see the end of {log}; "
            "the same command continues from here"
        )
