"""Judging that is killed at random moments, by a server that counts what it is asked."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tests.support.judging_server import JudgingServer, alpaca_eval_file, judging_server
from treg_megatron.evaluation.judgment_folder import read_judgments
from treg_megatron.utils.files import sha256_of_json

ROOT = Path(__file__).resolve().parents[2]
CONCURRENCY = 4
STARTING = 0.2  # share of the kills that come before the first request
SECONDS = 300  # for one attempt


class Storm:
    """Judging of ``prompts`` prompts, to be killed again and again.

    Attributes:
        counts: ``kills``; ``paid_twice``, answers to requests whose reply was on disk already; ``lost``, replies that
            were on disk once and are not any more, and judgments that differ from those of an undisturbed run;
            ``asked_again``, requests that were under way when the process was killed.
    """

    def __init__(self, folder: Path, server: JudgingServer, prompts: int, options: dict[str, str]):
        self.folder, self.server, self.options = folder, server, options
        self.counts: Counter[str] = Counter(kills=0, paid_twice=0, lost=0, asked_again=0)
        folder.mkdir(parents=True, exist_ok=True)
        chance = random.Random(0)
        for name in ("arm", "base"):
            rows = alpaca_eval_file(name, [chance.randrange(20) for _ in range(prompts)])
            (folder / f"{name}.json").write_text(json.dumps(rows))

    def run(self, kills: int, chance: random.Random) -> None:
        """Judge once undisturbed, and once with ``kills`` kills; compare, and count."""
        assert self._attempt("quiet").wait(SECONDS) == 0
        requests = len(self.server.asked)
        self.server.asked.clear()
        kept: set[str] = set()
        while self.counts["kills"] < kills:
            seen = len(self.server.asked)
            process = self._attempt("storm")
            left = max(requests - len(kept), 1)
            wait_for = 0 if chance.random() < STARTING else chance.randrange(1, max(left // 4, 2))
            if not self._reached(process, seen + wait_for):
                break  # it has finished
            time.sleep(chance.uniform(0.0, 1.0 if wait_for == 0 else 0.05))
            if process.poll() is not None:
                break
            if chance.random() < 0.5:
                os.killpg(process.pid, signal.SIGKILL)  # as Slurm does
            else:
                process.kill()  # as the kernel does, out of memory: helpers are left behind
            process.wait()
            self.counts["kills"] += 1
            self._check(seen, kept)
        seen = len(self.server.asked)
        assert self._attempt("storm").wait(SECONDS) == 0
        self._check(seen, kept)
        answered = Counter(map(sha256_of_json, self.server.asked))
        self.counts["asked_again"] = sum(answered.values()) - len(answered)
        expected, found = (
            {row["prompt_id"]: row["preference"] for row in read_judgments(self.folder / name / "judged").rows}
            for name in ("quiet", "storm")
        )
        self.counts["lost"] += sum(found.get(prompt) != preference for prompt, preference in expected.items())
        self.counts["lost"] += len(answered.keys() ^ kept)

    def _check(self, seen: int, kept: set[str]) -> None:
        """Count what an attempt asked although its reply was on disk, and what has gone from there."""
        time.sleep(5 * self.server.pause)  # requests under way
        self.counts["paid_twice"] += sum(sha256_of_json(body) in kept for body in self.server.asked[seen:])
        on_disk = kept_replies(self.folder / "storm" / "cache")
        self.counts["lost"] += len(kept - on_disk)
        kept |= on_disk

    def _reached(self, process: subprocess.Popen, requests: int) -> bool:
        """Wait until the server has answered so many requests; False if the process ends before."""
        start = time.monotonic()
        while len(self.server.asked) < requests:
            if process.poll() is not None:
                return False
            assert time.monotonic() - start < SECONDS, "the judge asks nothing"
            time.sleep(0.002)
        return process.poll() is None

    def _attempt(self, name: str) -> subprocess.Popen:
        settings = {
            "arm": self.folder / "arm.json",
            "baseline": self.folder / "base.json",
            "output": self.folder / name / "judged",
            "cache": self.folder / name / "cache",
            "server": self.server.address,
            "model": "judge",
            "concurrency": CONCURRENCY,
            "shard_prompts": 8,
        } | self.options
        log = open(self.folder / f"{name}.log", "a")
        with contextlib.closing(log):
            return subprocess.Popen(
                [sys.executable, "-m", "treg_megatron", "judge", *(f"judge.{k}={v}" for k, v in settings.items())],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def kept_replies(cache: Path) -> set[str]:
    """Hashes of the requests whose replies are whole on disk."""
    kept = set()
    for path in cache.glob("replies-*.jsonl"):
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                kept.add(sha256_of_json(json.loads(line)["request"]))
    return kept


def storm(folder: Path, kills: int, prompts: int, seed: int, options: dict[str, str]) -> Counter[str]:
    """The counts of one storm."""
    with judging_server() as server:
        server.pause = 0.02
        one = Storm(folder, server, prompts, options)
        one.run(kills, random.Random(seed))
        return one.counts
