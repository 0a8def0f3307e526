"""Fault-injection test: SIGKILL to random processes at random moments of labelling, training, saving and exporting.

    python benchmarks/kill_storm.py --kills 100
    python benchmarks/kill_storm.py --kills 100 --state storm --seconds 500     # in parts: repeat the command

One round labels, indexes, trains on two pipeline ranks and exports a small model. During each command a process of the
job, either a rank or a process that writes a rank's checkpoint, is killed at a random moment. When a rank dies, the
job's other processes are killed, as by `srun --kill-on-bad-exit`, and the same command is restarted without any
clean-up. At the end of the round, the labels, the metrics of every step, the record of the pairs trained on and the
exported weights are compared, bit for bit, with those of a round without kills.

Ranks are forked from a process that has imported the libraries, so a restart is cheaper here than on a cluster.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.forked import run_ranks, warm_up  # noqa: E402
from tests.support.tiny import tiny_llama, tiny_pair, tiny_tokenizer  # noqa: E402

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "tiny.yaml"
PAIRS, EPOCHS, GLOBAL_BATCH = 46, 16, 8
KILLS_PER_COMMAND = {"label": 2, "train": 25, "export": 2}
TRAIN_SECONDS = 5.0  # training is killed within this time after its start; about half of that is training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kills", type=int, default=100, help="stop after the round that reaches this many (%(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no further round after this time")
    parser.add_argument("--state", type=Path, help="folder that keeps the counts between calls (default: none)")
    arguments = parser.parse_args()
    warm_up()
    with tempfile.TemporaryDirectory() as scratch:
        storm = Storm(arguments.state or Path(scratch), Path(scratch))
        start = time.monotonic()
        while storm.counts["kills"] < arguments.kills and time.monotonic() - start < arguments.seconds:
            storm.round()
        storm.report()


class Killed(Exception):
    """A rank was killed, so all ranks of the job must end."""


class Storm:
    """Rounds of kills and the counts of their consequences.

    Args:
        state: folder of counts.json.
        scratch: folder for everything else.
    """

    def __init__(self, state: Path, scratch: Path):
        self.file, self.scratch = state / "counts.json", scratch
        state.mkdir(parents=True, exist_ok=True)
        self.counts = Counter(json.loads(self.file.read_text())) if self.file.exists() else Counter()
        tiny_llama(scratch / "hf", layers=4, vocab=tiny_tokenizer(scratch / "hf"))
        self.seconds: dict[str, float] = {}
        start = time.monotonic()
        self.expected = self._run(scratch / "quiet", random.Random(0), kills=False)
        self.quiet_seconds = time.monotonic() - start

    def round(self) -> None:
        """Run one round with kills, compare it with the round without kills, and save the counts."""
        number = self.counts["rounds"]
        start, folder = time.monotonic(), self.scratch / f"round{number}"
        found = self._run(folder, random.Random(number), kills=True)
        self.counts["milliseconds_lost"] += round(1000 * (time.monotonic() - start - self.quiet_seconds))
        for epoch in range(EPOCHS):
            seen = Counter(found["epochs"][epoch])
            self.counts["lost"] += PAIRS - len(seen)
            self.counts["repeated"] += sum(seen.values()) - len(seen)
        wrong = [name for name in self.expected if found[name] != self.expected[name]]
        self.counts["corrupt"] += len(wrong)
        self.counts["rounds"] += 1
        shutil.rmtree(folder)
        self.file.write_text(json.dumps(self.counts))
        print(
            f"round {number}: {self.counts['kills']} kills so far, {time.monotonic() - start:.0f} s instead of "
            f"{self.quiet_seconds:.0f} s, "
            + (f"DIFFERENT: {', '.join(wrong)}" if wrong else "everything equals the round without kills"),
            flush=True,
        )

    def report(self) -> None:
        """Print the counts and the figures."""
        kills = max(self.counts["kills"], 1)
        print(
            "kills while "
            + ", ".join(
                f"{name.removeprefix('while ')} {count}"
                for name, count in sorted(self.counts.items())
                if name.startswith("while ")
            )
        )
        print(
            f"{self.counts['of ranks']} of ranks, {self.counts['of helpers']} of their checkpoint writers; "
            f"{self.counts['restarts']} automatic restarts, {self.counts['rounds']} rounds"
        )
        print(f"figure seconds_lost_a_kill {self.counts['milliseconds_lost'] / 1000 / kills:.2f} s")
        for name, unit in (("kills", "kills"), ("lost", "pairs"), ("repeated", "pairs"), ("corrupt", "outputs")):
            print(f"figure {name} {self.counts[name]} {unit}")

    # -- one round

    def _run(self, folder: Path, chance: random.Random, kills: bool) -> dict:
        """Run all commands of a round; return everything that is compared between rounds."""
        from treg_megatron.checkpoint.from_hf import import_checkpoint
        from treg_megatron.config.recipe import load_recipe, section
        from treg_megatron.data.labelled_pairs import read_labelled
        from treg_megatron.labelling.indexing import index
        from treg_megatron.utils.files import sha256_of

        folder.mkdir()
        (folder / "pairs.jsonl").write_text("".join(json.dumps(tiny_pair(i, f"p{i}")) + "\n" for i in range(PAIRS)))
        overrides = [
            f"run={folder}",
            f"model.hf={self.scratch}/hf",
            f"label.pairs={folder}/pairs.jsonl",
            "label.shard_pairs=4",
            f"data.global_batch_size={GLOBAL_BATCH}",
            f"data.epochs={EPOCHS}",
            "parallel.pipeline=2",
            "train.save_every=3",
            "train.record_pairs=true",
            "train.hang_timeout_s=20",
        ]
        for command, ranks, action in (
            ("label", 2, label_command),
            ("train", 2, train_command),
            ("export", 1, export_command),
        ):
            if command == "train":
                recipe = load_recipe(RECIPE, overrides)
                index(section(recipe, "index"))
                import_checkpoint(self.scratch / "hf", folder / "megatron")
            start = time.monotonic()
            left = KILLS_PER_COMMAND[command] if kills else 0
            while not self._attempt(command, folder, ranks, action, overrides, chance, left > 0):
                left -= 1
                self.counts["restarts"] += 1
            self.seconds.setdefault(command, time.monotonic() - start)
        records = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
        return {
            "labels": [
                row
                for shard in sorted((folder / "labelled" / "train").glob("*.parquet"))
                for row in (
                    [
                        p.pair_id,
                        *(
                            getattr(p, f"{side}_{name}").tolist()
                            for side in ("chosen", "rejected")
                            for name in ("tokens", "token_rewards", "ref_logprobs")
                        ),
                    ]
                    for p in read_labelled(shard)
                )
            ],
            "metrics": [{k: v for k, v in record.items() if k != "seconds"} for record in records],
            "epochs": epochs_of(folder / "train"),
            "weights": sha256_of(folder / "hf" / "model.safetensors"),
        }

    def _attempt(
        self,
        command: str,
        folder: Path,
        ranks: int,
        action: Callable,
        overrides: list[str],
        chance: random.Random,
        kill: bool,
    ) -> bool:
        """Run a command once, with or without a kill; return whether it finished."""

        def strike() -> None:
            time.sleep(chance.uniform(0.0, TRAIN_SECONDS if command == "train" else self.seconds[command]))
            victims = processes_of_ranks()
            if not victims:
                return  # the command has already finished
            rank_alive = [pid for pid, is_rank in victims.items() if is_rank]
            pid = chance.choice(rank_alive if chance.random() < 0.7 and rank_alive else list(victims))
            while_saving = any((folder / "train" / "checkpoints").glob("*-unfinished"))
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                return  # it has just finished
            self.counts["kills"] += 1
            self.counts["of ranks" if victims[pid] else "of helpers"] += 1
            self.counts[f"while {'saving' if while_saving and command == 'train' else command + 'ing'}"] += 1
            if victims[pid]:
                raise Killed

        try:
            run_ranks(ranks, action, overrides, log=folder / f"{command}.log", meanwhile=strike if kill else None)
        except (Killed, AssertionError) as error:
            if not kill:
                raise
            if isinstance(error, AssertionError) and "Traceback" in str(error):
                self.counts["ended by themselves"] += 1
            return False
        return True


def label_command(overrides: list[str]) -> None:
    """Label the pairs, as ``tools/label_tokens.py`` does."""
    from treg_megatron.config.recipe import load_recipe, section
    from treg_megatron.labelling.job import label

    label(section(load_recipe(RECIPE, overrides), "label"))


def train_command(overrides: list[str]) -> None:
    """Train, as ``python -m treg_megatron.train`` does."""
    from treg_megatron.config.recipe import load_recipe
    from treg_megatron.train import train

    train(load_recipe(RECIPE, overrides))


def export_command(overrides: list[str]) -> None:
    """Export the newest checkpoint, unless the export had finished before it was killed."""
    from treg_megatron.checkpoint.to_hf import export_checkpoint
    from treg_megatron.config.recipe import load_recipe, section

    export = section(load_recipe(RECIPE, overrides), "export")
    if not Path(export.output).exists():  # the kill came after the finished folder was renamed
        export_checkpoint(export.checkpoint, export.base, export.output, export.dtype, shard_bytes=1 << 30)


def processes_of_ranks() -> dict[int, bool]:
    """Ids of the job's living processes, and whether each is a rank, that is, the leader of its session."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, (state, _parent, _, session) = int(stat.parent.name), stat.read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if state != "Z" and int(session) in _children(os.getpid()):
            found[pid] = pid == int(session)
    return found


def _children(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def epochs_of(run: Path) -> list[list[str]]:
    """Ids of the pairs that each epoch was trained on, in order."""
    from treg_megatron.data.sampler import recorded_pairs

    by_step = recorded_pairs(run)
    per_epoch = -(-PAIRS // GLOBAL_BATCH)
    return [
        [pair for step in range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1) for pair in by_step.get(step, [])]
        for epoch in range(EPOCHS)
    ]


if __name__ == "__main__":
    main()
