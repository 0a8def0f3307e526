"""End-to-end demo: from preference pairs to an aligned Hugging Face model, on this machine.

    make demo                     or:   python demo/run.py [--fresh]

Each step is a separate command, printed before it runs, which also works without this script. Finished steps are
skipped, so an interrupted demo continues where it stopped.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from report import oracle_labels, write_report

from treg_megatron.config.recipe import BASE_RECIPE, load_recipe, section
from treg_megatron.config.schema import Recipe
from treg_megatron.errors import UserError
from treg_megatron.utils import entry
from treg_megatron.utils.files import atomic_write, sha256_of, sha256_of_json

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "recipes/smollm2_135m.yaml"
PAIRS = {"train": "demo/pairs/train.jsonl", "heldout": "demo/pairs/heldout.jsonl"}
RANKS = 2
# DPO, to take its log-ratio: a quarter of the steps at four times the learning rate, or the demo would take too long
ORACLE = ["objective.alpha=0", "train.max_steps=4", "optimizer.lr=2e-5", "data.validation=null"]


@dataclass(frozen=True)
class Step:
    """One command and the path that exists once it has finished; None for training, which resumes by itself."""

    name: str
    arguments: list[str]
    output: Path | None
    ranks: int = 1


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="delete the output of an earlier demo and start over")
    arguments = parser.parse_args(argv)
    recipe = load_recipe(ROOT / RECIPE)
    folder = ROOT / recipe.run
    if arguments.fresh and folder.exists():
        shutil.rmtree(folder)
    progress = Progress(folder / "demo.json")
    for step in steps(recipe):
        run_step(step, progress)
    start = time.monotonic()
    print("\n== report", flush=True)
    text = write_report(recipe, ROOT, progress.seconds)
    print(f"report took {time.monotonic() - start:.0f} s\n\n{text}")


def steps(recipe: Recipe) -> list[Step]:
    """The demo's commands, in order."""
    model, export, evaluate = (section(recipe, name) for name in ("model", "export", "evaluate"))
    judge, accuracy = section(recipe, "judge"), section(recipe, "accuracy")
    comparison = str(Path(judge.output).with_name("comparison"))
    labelled = {split: str(Path(section(recipe, "label").output).with_name(split)) for split in PAIRS}
    streams = {"train": section(recipe, "data").train, "heldout": section(recipe, "data").validation}
    from_recipe = ["--recipe", RECIPE]
    oracle = f"{recipe.run}/oracle"
    return [
        Step("model", ["demo/smollm2.py", "--output", model.hf], Path(model.hf)),
        Step("import", ["tools/convert_checkpoint.py", "import", *from_recipe], Path(model.checkpoint)),
        *(
            Step(
                f"label {split}",
                ["tools/label_tokens.py", *from_recipe, "--pairs", PAIRS[split], "--output", labelled[split]],
                Path(labelled[split], "manifest.json"),
            )
            for split in PAIRS
        ),
        *(
            Step(
                f"index {split}",
                ["tools/index_pairs.py", *from_recipe, "--labelled", labelled[split], "--output", streams[split]],
                Path(streams[split] + ".manifest.json"),
            )
            for split in PAIRS
        ),
        Step("train", train_command(from_recipe), None, RANKS),
        Step("export", ["tools/convert_checkpoint.py", "export", *from_recipe], Path(export.output)),
        Step(
            "accuracy",
            ["tools/preference_accuracy.py", *from_recipe],
            Path(accuracy.output, "accuracy.json"),
        ),
        Step(
            "answers before",
            [
                "tools/generate_answers.py",
                *from_recipe,
                *("--model", model.hf, "--name", "reference", "--output", judge.baseline),
            ],
            Path(judge.baseline, "manifest.json"),
        ),
        Step("answers after", ["tools/generate_answers.py", *from_recipe], Path(evaluate.output, "manifest.json")),
        Step("judge", ["tools/judge_answers.py", *from_recipe], Path(judge.output, "manifest.json")),
        Step(
            "compare",
            ["tools/compare_arms.py", recipe.run, "--output", comparison],
            Path(comparison, "report.html"),
        ),
        Step("train oracle", train_command([*from_recipe, *ORACLE, f"train.output={oracle}/train"]), None, RANKS),
        Step(
            "export oracle",
            [
                "tools/convert_checkpoint.py",
                "export",
                *from_recipe,
                *("--checkpoint", f"{oracle}/train", "--output", f"{oracle}/hf"),
            ],
            Path(oracle, "hf"),
        ),
        Step(
            "label heldout by oracle",
            [
                "tools/label_tokens.py",
                *from_recipe,
                *("--pairs", PAIRS["heldout"], "--output", oracle_labels(recipe)),
                *("--source", "model_ratio", "--better-model", f"{oracle}/hf"),
            ],
            Path(oracle_labels(recipe), "manifest.json"),
        ),
    ]


def train_command(arguments: list[str]) -> list[str]:
    """Training on ``RANKS`` processes of this machine."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    return [*launcher, "-m", "treg_megatron.train", *arguments]


class Progress:
    """Duration of each finished step in seconds, kept in a file together with a digest of the inputs.

    Raises:
        UserError: the pairs or the recipe changed since the first step ran.
    """

    def __init__(self, path: Path):
        self.path = path
        self.inputs = sha256_of_json(
            [sha256_of(path) for path in (BASE_RECIPE, ROOT / RECIPE, *(ROOT / pairs for pairs in PAIRS.values()))]
        )
        found = json.loads(path.read_text()) if path.exists() else {"inputs": self.inputs, "seconds": {}}
        if found["inputs"] != self.inputs:
            raise UserError(
                f"the recipe or the pairs have changed since {path.parent} was started; "
                "start over with: make demo ARGS=--fresh"
            )
        self.seconds: dict[str, float] = found["seconds"]

    def add(self, name: str, seconds: float) -> None:
        """Record that a step finished."""
        self.seconds[name] = seconds
        with atomic_write(self.path) as partial:
            partial.write_text(json.dumps({"inputs": self.inputs, "seconds": self.seconds}, indent=2) + "\n")


def run_step(step: Step, progress: Progress) -> None:
    """Run a step unless it has finished before; a failing step ends the demo with its exit code."""
    if step.name in progress.seconds or step.output is not None and (ROOT / step.output).exists():
        print(f"\n== {step.name}: finished before", flush=True)
        return
    print(f"\n== {step.name}: python {' '.join(step.arguments)}", flush=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, *step.arguments], cwd=ROOT, env=environment(step)).returncode
    if code != 0:
        print(
            f"\nthe demo stops: step {step.name} failed, see its message above; the same command continues from here",
            file=sys.stderr,
        )
        sys.exit(code if code > 0 else 128 - code)
    progress.add(step.name, time.monotonic() - start)
    print(f"{step.name} took {progress.seconds[step.name]:.0f} s", flush=True)


def environment(step: Step) -> dict[str, str]:
    """The step's environment variables: several ranks share the cores evenly, as oversubscription slows all of them."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // step.ranks))} if step.ranks > 1 else {}
    return {**threads, **os.environ}


if __name__ == "__main__":
    entry.run(main)
