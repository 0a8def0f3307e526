"""Steps of the study, run as commands of the public tools; finished steps are skipped."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from studies.miniature import data, measure, model, world
from studies.miniature.configuration import FORMS, RECIPE, Reference, Run, Study, form_path
from studies.miniature.warm import step
from treg_megatron.errors import UserError
from treg_megatron.labelling.prompt_pair import load_prompt_pair

REFERENCE = "reference"
ORACLE = "oracle"  # training data labelled by a frozen model: the reference's own best DPO run


def write_world(study: Study) -> None:
    """Write the prompts of every split, which all references share."""
    sizes = study.world["prompts"]
    if not all(prompts_path(study, split).exists() for split in sizes):
        tasks = _tasks(study)
        for split, size in sizes.items():
            data.write_records(prompts_path(study, split), data.prompt_records(split, tasks[split][:size]))


def train_reference(reference: Reference) -> None:
    """Train the reference with the objective `sft`, export it, and import it again for the runs to start from."""
    folder, settings = reference.folder / REFERENCE, reference.study.training
    random, start, streams = folder / "random", folder / "random-megatron", folder / "streams"
    log = reference.folder / "logs" / f"{REFERENCE}.log"
    if not reference.model.exists():
        shape = reference.study.models[reference.name]
        records = data.reference_records(
            _tasks(reference.study)["train"][: settings["tasks"]],
            settings["examples"],
            [load_prompt_pair(form_path(form)) for form in FORMS],
            shape["seed"],
        )
        data.write_records(folder / "rows.jsonl", records)
        if not random.exists():
            model.write_model(random, **shape)
        _unless(
            start,
            "tools/convert_checkpoint.py",
            "import",
            *_recipe(reference),
            "--hf",
            random,
            "--checkpoint",
            start,
            log=log,
        )
        _unless(
            streams.with_name("streams.manifest.json"),
            "tools/index_pairs.py",
            *_recipe(reference),
            "--labelled",
            folder / "rows.jsonl",
            "--output",
            streams,
            "--tokenizer",
            random,
            log=log,
        )
        step(
            "treg_megatron.train",
            *_recipe(reference),
            *_overrides(
                {
                    "model.hf": random,
                    "model.checkpoint": start,
                    "data.train": streams,
                    "train.output": folder / "train",
                    "objective.loss_type": "sft",
                    "objective.alpha": 0.0,
                    "train.save_every": 250,
                    **settings["settings"],
                }
            ),
            log=log,
        )
        _export(reference, folder / "train", reference.model, log, "--base", random)
    _unless(reference.folder / "megatron", "tools/convert_checkpoint.py", "import", *_recipe(reference), log=log)


def make_pairs(reference: Reference, split: str) -> None:
    """Create on-policy pairs with token rewards (sample, rank, label).

    For development and test prompts also label them by the other forms of the request, and write the token set that
    credit is measured on.
    """
    run, log = reference.folder, reference.folder / "logs" / f"pairs-{split}.log"
    samples, pairs = run / "samples" / split, run / "pairs" / f"{split}.jsonl"
    _unless(
        samples / "manifest.json",
        "tools/sample_responses.py",
        *_recipe(reference),
        "--prompts",
        prompts_path(reference.study, split),
        "--output",
        samples,
        log=log,
    )
    _unless(pairs, "tools/rank_responses.py", *_recipe(reference), "--samples", samples, "--output", pairs, log=log)
    for form in FORMS[:1] if split == "train" else FORMS:
        _unless(
            labelled_path(reference, split, form) / "manifest.json",
            "tools/label_tokens.py",
            *_recipe(reference),
            f"label.prompt_pair={form_path(form)}",
            "--pairs",
            pairs,
            "--output",
            labelled_path(reference, split, form),
            log=log,
        )
    if split != "train":
        labelled = {form: labelled_path(reference, split, form) for form in FORMS}
        credit = measure.credit_set(labelled, pairs, prompts_path(reference.study, split))
        measure.save_arrays(credit_path(reference, split), credit)


def index_training_pairs(reference: Reference) -> None:
    """Index the training sets: one with the reference's token rewards, one with the verifier's marks instead."""
    run, log = reference.folder, reference.folder / "logs" / "streams.log"
    data.write_records(
        run / "pairs" / "truth.jsonl", data.truth_records(data.read_records(run / "pairs" / "train.jsonl"))
    )
    _unless(
        run / "labelled" / "truth.parquet",
        "tools/import_rewards.py",
        *_recipe(reference),
        "--pairs",
        run / "pairs" / "truth.jsonl",
        "--output",
        run / "labelled" / "truth.parquet",
        log=log,
    )
    _index(reference, "train", labelled_path(reference, "train", FORMS[0]), log)
    _index(reference, "truth", run / "labelled" / "truth.parquet", log)


def make_oracle_rewards(reference: Reference, run: Run) -> None:
    """Label the training pairs by the log-ratio of a frozen policy, which is trained by repeating ``run``, over the
    reference, and index them."""
    folder, log = reference.folder / ORACLE, reference.folder / "logs" / f"{ORACLE}.log"
    if not (folder / "hf").exists():
        _train_and_export(reference, run, folder, log)
    labelled = reference.folder / "labelled" / ORACLE
    _unless(
        labelled / "manifest.json",
        "tools/label_tokens.py",
        *_recipe(reference),
        *_overrides({"label.source": "model_ratio", "label.better_model": folder / "hf"}),
        "--output",
        labelled,
        log=log,
    )
    _index(reference, ORACLE, labelled, log)


def prompts_path(study: Study, split: str) -> Path:
    """Path of the prompts of a split."""
    return study.run / "prompts" / f"{split}.jsonl"


def labelled_path(reference: Reference, split: str, form: str) -> Path:
    """Folder of the ranked pairs of a split, labelled by a form of the revision requests."""
    return reference.folder / "labelled" / f"{split}-{form}"


def credit_path(reference: Reference, split: str) -> Path:
    """Path of the token set on which credit is measured."""
    return reference.folder / "credit" / f"{split}.npz"


def result_path(reference: Reference, name: str, split: str) -> Path:
    """Path of the measurements of a run, or of the reference, on a split."""
    return reference.folder / "results" / f"{name}.{split}.npz"


def train_and_measure(reference: Reference, run: Run, split: str) -> None:
    """Train one run from the reference and measure it; checkpoints and answers are deleted afterwards.

    A run of the search whose loss stops being finite scores 0.
    """
    folder, log = run_folder(reference, run), reference.folder / "logs" / f"{run.name}.log"
    try:
        if not (folder / "hf").exists():
            _train_and_export(reference, run, folder, log)
        more = measure.curves(folder / "train" / "metrics.jsonl")
        measure_policy(reference, run.name, folder, folder / "hf", split, more)
    except UserError:
        if split != "dev" or "no update was made from it" not in log.read_text(encoding="utf-8"):
            raise
        nothing = {"sampled/score": np.zeros((1, 1)), "kl": np.full((1, 1), np.inf)}
        measure.save_arrays(result_path(reference, run.name, split), nothing)
    shutil.rmtree(folder)


def run_folder(reference: Reference, run: Run) -> Path:
    """Folder of a run while it is trained and measured."""
    return reference.folder / "runs" / run.name


def measure_reference(reference: Reference, split: str) -> None:
    """Measure the reference itself."""
    measure_policy(reference, REFERENCE, reference.folder / REFERENCE / split, reference.model, split, {})


def measure_policy(reference: Reference, name: str, folder: Path, hf: Path, split: str, more: dict[str, Any]) -> None:
    """Generate answers to the prompts of a split, and save their measurements.

    Development prompts get what the search looks at, which is sampled answers and their KL; test prompts greedy answers
    and the implicit token rewards as well.

    Args:
        folder: folder for the answers.
        hf: the policy's Hugging Face folder.
        more: arrays to save with the measurements.
    """
    log = reference.folder / "logs" / f"{name}.log"
    ways = {"sampled": reference.study.measure["sampled"]}
    if split == "test":
        ways["greedy"] = {"sample.temperature": 0.0, "sample.seeds": [0]}
    found: dict[str, Any] = dict(more)
    for way, settings in ways.items():
        _unless(
            folder / way / "manifest.json",
            "tools/sample_responses.py",
            *_recipe(reference),
            *_overrides(settings),
            "--model",
            hf,
            "--prompts",
            prompts_path(reference.study, split),
            "--output",
            folder / way,
            log=log,
        )
        found |= {f"{way}/{what}": values for what, values in measure.answers(folder / way).items()}
    found["kl"] = measure.divergence(hf, reference.model, folder / "sampled")
    if split == "test":
        credit = measure.load_arrays(credit_path(reference, split))
        found["implicit"] = measure.implicit_rewards(hf, labelled_path(reference, split, FORMS[0]), credit)
    measure.save_arrays(result_path(reference, name, split), found)


def _train_and_export(reference: Reference, run: Run, folder: Path, log: Path) -> None:
    step(
        "treg_megatron.train",
        *_recipe(reference),
        *_overrides(run.overrides),
        f"train.output={folder / 'train'}",
        log=log,
    )
    _export(reference, folder / "train", folder / "hf", log)


def _export(reference: Reference, checkpoint: Path, output: Path, log: Path, *more: str | Path) -> None:
    where = ("--checkpoint", checkpoint, "--output", output)
    step("tools/convert_checkpoint.py", "export", *_recipe(reference), *where, *more, log=log)


def _tasks(study: Study) -> dict[str, list[world.Task]]:
    """The tasks of every split; those of the training split begin with the prompts and go on for the references."""
    sizes = study.world["prompts"]
    sizes = {**sizes, "train": max(sizes["train"], study.training["tasks"])}
    return world.splits(study.world["seed"], sizes, study.world["shares"])


def _index(reference: Reference, streams: str, labelled: Path, log: Path) -> None:
    output = reference.folder / "streams" / streams
    _unless(
        output.with_name(f"{streams}.manifest.json"),
        "tools/index_pairs.py",
        *_recipe(reference),
        "--labelled",
        labelled,
        "--output",
        output,
        log=log,
    )


def _recipe(reference: Reference) -> list[str]:
    return ["--recipe", str(RECIPE), f"run={reference.folder}"]


def _overrides(settings: dict[str, Any]) -> list[str]:
    return [f"{name}={str(value).replace(' ', '')}" for name, value in settings.items()]


def _unless(output: Path, program: str, *arguments: object, log: Path) -> None:
    if not output.exists():
        step(program, *arguments, log=log)
