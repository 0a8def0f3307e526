"""From preference pairs to an aligned Hugging Face model, station by station, on this machine.

    make demo                     or:   python demo/run.py [--fresh]

Every station is a command of its own, printed before it runs, that works as well without this script. Finished
stations are skipped: an interrupted demo goes on where it stopped.
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

from report import write_report

from treg_megatron.config.recipe import BASE_RECIPE, load_recipe, section
from treg_megatron.config.schema import Recipe
from treg_megatron.errors import UserError
from treg_megatron.utils import entry
from treg_megatron.utils.files import atomic_write, sha256_of, sha256_of_json

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "recipes/smollm2_135m.yaml"
PAIRS = {"train": "demo/pairs/train.jsonl", "heldout": "demo/pairs/heldout.jsonl"}
RANKS = 2


@dataclass(frozen=True)
class Station:
    """One command, and what exists once it has finished; training has no such file, it knows where it stopped."""

    name: str
    arguments: list[str]
    output: Path | None
    ranks: int = 1


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="delete what an earlier demo wrote and start over")
    arguments = parser.parse_args(argv)
    recipe = load_recipe(ROOT / RECIPE)
    folder = ROOT / recipe.run
    if arguments.fresh and folder.exists():
        shutil.rmtree(folder)
    progress = Progress(folder / "demo.json")
    for station in stations(recipe):
        run_station(station, progress)
    start = time.monotonic()
    print("\n== report", flush=True)
    text = write_report(recipe, ROOT, progress.seconds)
    print(f"report took {time.monotonic() - start:.0f} s\n\n{text}")


def stations(recipe: Recipe) -> list[Station]:
    """The demo's commands in their order."""
    model, train, export = (section(recipe, name) for name in ("model", "train", "export"))
    labelled = {split: str(Path(section(recipe, "label").output).with_name(split)) for split in PAIRS}
    streams = {"train": section(recipe, "data").train, "heldout": section(recipe, "data").validation}
    from_recipe = ["--recipe", RECIPE]
    return [
        Station("model", ["demo/smollm2.py", "--output", model.hf], Path(model.hf)),
        Station("import", ["tools/convert_checkpoint.py", "import", *from_recipe], Path(model.checkpoint)),
        *(
            Station(
                f"label {split}",
                ["tools/label_tokens.py", *from_recipe, "--pairs", PAIRS[split], "--output", labelled[split]],
                Path(labelled[split], "manifest.json"),
            )
            for split in PAIRS
        ),
        *(
            Station(
                f"index {split}",
                ["tools/index_pairs.py", *from_recipe, "--labelled", labelled[split], "--output", streams[split]],
                Path(streams[split] + ".manifest.json"),
            )
            for split in PAIRS
        ),
        Station(
            "train",
            [
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                str(RANKS),
                "-m",
                "treg_megatron.train",
                *from_recipe,
            ],
            None,
            RANKS,
        ),
        Station("export", ["tools/convert_checkpoint.py", "export", *from_recipe], Path(export.output)),
    ]


class Progress:
    """Seconds of each finished station, kept in a file, with a digest of what they were made from.

    Raises:
        UserError: the pairs or the recipe changed since the first station ran.
    """

    def __init__(self, path: Path):
        self.path = path
        self.inputs = sha256_of_json(
            [sha256_of(path) for path in (BASE_RECIPE, ROOT / RECIPE, *(ROOT / pairs for pairs in PAIRS.values()))]
        )
        found = json.loads(path.read_text()) if path.exists() else {"inputs": self.inputs, "seconds": {}}
        if found["inputs"] != self.inputs:
            raise UserError(
                f"the recipe or the pairs changed since {path.parent} was begun; "
                "start over with: make demo ARGS=--fresh"
            )
        self.seconds: dict[str, float] = found["seconds"]

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = seconds
        with atomic_write(self.path) as partial:
            partial.write_text(json.dumps({"inputs": self.inputs, "seconds": self.seconds}, indent=2) + "\n")


def run_station(station: Station, progress: Progress) -> None:
    """Run a station that has not finished yet; one that fails ends the demo with its exit code."""
    if station.name in progress.seconds or station.output is not None and (ROOT / station.output).exists():
        print(f"\n== {station.name}: finished before", flush=True)
        return
    print(f"\n== {station.name}: python {' '.join(station.arguments)}", flush=True)
    start = time.monotonic()
    code = subprocess.run([sys.executable, *station.arguments], cwd=ROOT, env=environment(station)).returncode
    if code != 0:
        print(
            f"\nthe demo stops: station {station.name} failed, its message stands above; "
            "the same command goes on from here",
            file=sys.stderr,
        )
        sys.exit(code if code > 0 else 128 - code)
    progress.add(station.name, time.monotonic() - start)
    print(f"{station.name} took {progress.seconds[station.name]:.0f} s", flush=True)


def environment(station: Station) -> dict[str, str]:
    """Several ranks share the cores evenly: more threads than cores make all of them wait."""
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // station.ranks))} if station.ranks > 1 else {}
    return {**threads, **os.environ}


if __name__ == "__main__":
    entry.run(main)
