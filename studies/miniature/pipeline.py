"""The study's steps as command lines of the public stations; what is finished is not done again."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from studies.miniature import data, measure, model, world
from studies.miniature.configuration import PROMPT_PAIR, RECIPE, ROOT, Run, Study
from studies.miniature.warm import station
from treg_megatron.errors import UserError
from treg_megatron.labelling.prompt_pair import load_prompt_pair

REFERENCE = "reference"


def write_world(study: Study) -> None:
    """Prompts of every split, the rows that the reference learns from, and its random weights."""
    settings, reference = study.world, study.reference
    sizes = settings["prompts"]
    drawn = {**sizes, "train": max(sizes["train"], reference["tasks"])}
    tasks = world.splits(settings["seed"], drawn, settings["shares"])
    for split, size in sizes.items():
        data.write_rows(study.run / "prompts" / f"{split}.jsonl", data.prompt_rows(split, tasks[split][:size]))
    data.write_rows(
        study.run / REFERENCE / "rows.jsonl",
        data.reference_rows(
            tasks["train"][: reference["tasks"]], reference["examples"], load_prompt_pair(PROMPT_PAIR), settings["seed"]
        ),
    )
    model.write_model(study.run / REFERENCE / "random", **reference["model"])


def train_reference(study: Study) -> None:
    """Import, index, train with the objective `sft`, export, and import again for the runs to start from."""
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
        station(
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
    station("tools/convert_checkpoint.py", "import", *_recipe(study), log=log)


def make_pairs(study: Study, split: str) -> None:
    """On-policy pairs of a split with token rewards: sample, rank, label; and the tokens that credit is measured on."""
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
    """Streams to train on: with the reference's token rewards, and with the verifier's marks in their place."""
    run, log = study.run, study.run / "logs" / "streams.log"
    data.write_rows(run / "pairs" / "truth.jsonl", data.truth_rows(data.read_rows(run / "pairs" / "train.jsonl")))
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
    """Where the measures of a run, or of the reference, on a split are kept."""
    return study.run / "results" / f"{name}.{split}.npz"


def train_and_measure(study: Study, run: Run, split: str) -> None:
    """One run from the reference to its measures; checkpoints and answers are not kept."""
    folder, log = study.run / "runs" / run.name, study.run / "logs" / f"{run.name}.log"
    if not (folder / "hf").exists():
        station(
            "treg_megatron.train",
            *_recipe(study),
            *_overrides(run.overrides),
            f"train.output={folder / 'train'}",
            log=log,
        )
        station(
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
    """The same measures of the reference itself."""
    measure_policy(study, REFERENCE, study.run / REFERENCE / split, study.run / REFERENCE / "hf", split, {})


def measure_policy(study: Study, name: str, folder: Path, hf: Path, split: str, more: dict[str, Any]) -> None:
    """Greedy and sampled answers to the prompts of a split, and what measure.py makes of them."""
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
        station(program, *arguments, log=log)


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
            "the same command goes on from here"
        )
