"""Two jobs on one output, started at random moments: imports, labellings and trainings of a small model.

    python benchmarks/two_writers.py --contests 200

In every contest two processes run the same command on the same output. In every third one of them is killed at a random
moment, without a chance to clean up. One must win, and the other must be told in one line who holds the output, or find
it finished. Then the command runs once more, alone, and what it leaves is compared, bit for bit, with the result of a
command that had no rival.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.file_operations import contents  # noqa: E402
from tests.support.forked import warm_up  # noqa: E402
from tests.support.training import RECIPE, make_run  # noqa: E402
from tests.support.two_writers import alone, contest, remove  # noqa: E402

SHARE = {"import": 0.4, "label": 0.4, "train": 0.2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contests", type=int, default=200, help="number of contests (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warm_up()
    counts: Counter[str] = Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        for command in commands(Path(scratch)):
            start = time.monotonic()
            alone(command.run, Path(scratch) / "alone.log")
            seconds = time.monotonic() - start
            expected = command.result()
            for number in range(round(arguments.contests * SHARE[command.name])):
                chance = random.Random(f"{arguments.seed} {command.name} {number}")
                remove(*command.outputs)
                kill = number % 3 == 2
                ended = contest(command.run, Path(scratch) / "logs", chance, seconds, kill)
                complaint = ended.complaint(kill)
                if complaint is None:
                    alone_again(command, Path(scratch) / "again.log")
                    complaint = None if command.result() == expected else "the result differs"
                if complaint:
                    wrong.append(f"{command.name} {number}: {complaint}")
                    print(wrong[-1], flush=True)
                counts["contests"] += 1
                counts["refused"] += ended.refused
                counts["killed"] += ended.codes.count(-9)
            print(f"{command.name}: {counts['contests']} contests so far, {len(wrong)} wrong", flush=True)
    for name in ("contests", "refused", "killed"):
        print(f"figure {name} {counts[name]} {'jobs' if name != 'contests' else name}")
    print(f"figure wrong {len(wrong)} contests")
    sys.exit(1 if wrong else 0)


class Command:
    """A command, the files that it writes, and what of them must always be the same."""

    def __init__(self, name: str, run: Callable[[], Any], outputs: list[Path], result: Callable[[], Any]):
        self.name, self.run, self.outputs, self.result = name, run, outputs, result


def alone_again(command: Command, log: Path) -> None:
    """Run the command a last time; an import that exists is left as it is."""
    if command.name != "import" or not command.outputs[0].exists():
        alone(command.run, log)


def commands(folder: Path) -> list[Command]:
    """Import, label and train, with their inputs in ``folder``."""
    from treg_megatron.checkpoint.from_hf import import_checkpoint
    from treg_megatron.config.recipe import load_recipe, section
    from treg_megatron.labelling.job import label
    from treg_megatron.train import train

    files = make_run(folder, tied=False)
    imported, labelled, run = folder / "imported", folder / "contested", folder / "train"
    labels = [*files.overrides, f"label.pairs={folder}/train.jsonl", f"label.output={labelled}", "label.shard_pairs=3"]
    steps = files.sections(run, "train.max_steps=6", "train.save_every=2", "data.global_batch_size=4")
    return [
        Command("import", lambda: import_checkpoint(files.hf, imported), [imported], lambda: contents(imported)),
        Command(
            "label",
            lambda: label(section(load_recipe(RECIPE, labels), "label")),
            [labelled],
            lambda: contents(labelled),
        ),
        Command("train", lambda: train(load_recipe(RECIPE, steps)), [run], lambda: trained(run)),
    ]


def trained(run: Path) -> list:
    """The metrics of every step, and the names and sizes of what counts as the last checkpoint."""
    from treg_megatron.checkpoint.layout import find_checkpoint

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = find_checkpoint(run)
    sizes = {p.name: p.stat().st_size for p in sorted((last / "weights").iterdir()) if p.suffix == ".distcp"}
    return [last.name, sizes, [{k: v for k, v in line.items() if k != "seconds"} for line in lines]]


if __name__ == "__main__":
    main()
