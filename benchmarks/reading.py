"""Rate and peak memory of reading preference pairs: `treg inspect` of a large JSONL file and of a large JSON array.

    python benchmarks/reading.py --gb 2

Both files are written to a temporary folder, hold the same pairs, and are removed at the end. A pair has an id, a
prompt of one to five turns, two answers and two scores; the lengths of the texts are spread as those of chat data are.
Each file is read by a command of its own, which starts as many processes as there are cores. The time for a hundred
pairs is subtracted as start-up time. The CPU rate, over seconds of processor time, depends little on other load on the
machine; the figure is over wall-clock time. The peak is that of all processes of the command together; what they share
counts once.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FEW = 100
_SAMPLED_EVERY = 0.5  # seconds
WORDS = (
    "the of and to a in is that it you for on with as are this be or from can your an which has at by not will more "
    "however therefore because answer question example function returns value number result – naïve café 例えば 数字"
).split()


class Measured(NamedTuple):
    """What one process took."""

    seconds: float
    cpu_seconds: float
    peak_gb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2, help="size of each file, in GB (10^9 bytes)")
    arguments = parser.parse_args()
    rates, peaks = [], []
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.jsonl"
        write(small, ("", "\n", "\n"), limit=FEW)
        start = inspect(small)
        print(f"start-up: {start.seconds:.1f} s, {start.peak_gb:.2f} GB", flush=True)
        for name, punctuation in (("pairs.jsonl", ("", "\n", "\n")), ("pairs.json", ("[", ", ", "]"))):
            path = Path(folder) / name
            count = write(path, punctuation, bytes=int(arguments.gb * 1e9))
            megabytes = path.stat().st_size / 1e6
            took = inspect(path)
            rates.append(megabytes / (took.seconds - start.seconds))
            peaks.append(took.peak_gb)
            cpu_rate = megabytes / (took.cpu_seconds - start.cpu_seconds)
            print(
                f"{name}: {megabytes:.0f} MB, {count} pairs, {took.seconds:.1f} s, {rates[-1]:.1f} MB/s "
                f"({cpu_rate:.1f} MB per CPU second), peak {took.peak_gb:.2f} GB",
                flush=True,
            )
            path.unlink()
    print(f"figure read_pairs_mb_s {min(rates):.1f} MB/s")
    print(f"figure read_pairs_peak_gb {max(peaks):.2f} GB")


def write(path: Path, punctuation: tuple[str, str, str], bytes: int | None = None, limit: int | None = None) -> int:
    """Write pairs with what stands before, between and after them, up to a size or a number; return their number."""
    before, between, after = (part.encode() for part in punctuation)
    count = size = 0
    with open(path, "wb") as stream:
        stream.write(before)
        for row in pairs():
            text = between * (count > 0) + json.dumps(row, ensure_ascii=False).encode()
            stream.write(text)
            count, size = count + 1, size + len(text)
            if count == limit or (bytes is not None and size >= bytes):
                break
        stream.write(after)
    return count


def pairs() -> Iterator[dict]:
    """Endless pairs, always the same ones; texts are drawn from a pool, and made unique by a number."""
    draw = random.Random(0)
    pool = [" ".join(draw.choices(WORDS, k=min(int(draw.lognormvariate(4.6, 0.9)), 1500) + 1)) for _ in range(4000)]
    number = 0
    while True:
        number += 1
        turns = draw.choice((1, 1, 1, 3, 5))
        prompt = [
            {"role": ("user", "assistant")[turn % 2], "content": f"{draw.choice(pool)} {number}?"}
            for turn in range(turns)
        ]
        answers = [[{"role": "assistant", "content": f"{draw.choice(pool)}\n\n{side} {number}"}] for side in "ab"]
        yield {
            "id": f"pair-{number}",
            "prompt": prompt,
            "chosen": answers[0],
            "rejected": answers[1],
            "score_chosen": draw.randint(5, 10),
            "score_rejected": draw.randint(1, 5) - 0.5,
        }


def inspect(path: Path) -> Measured:
    """Run `treg inspect` on a file."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "treg_megatron", "inspect", str(path)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(_SAMPLED_EVERY):
            peak[0] = max(peak[0], sum(map(memory, [child.pid, *children(child.pid)])))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, used = os.wait4(child.pid, 0)
    ended.set()
    watcher.join()
    if status:
        raise SystemExit(f"{' '.join(command)} failed: {os.waitstatus_to_exitcode(status)}")
    peak_gb = max(peak[0], used.ru_maxrss * 1024) / 1e9
    return Measured(time.perf_counter() - start, used.ru_utime + used.ru_stime, peak_gb)


def children(process: int) -> list[int]:
    """The processes that a process started."""
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def memory(process: int) -> int:
    """Bytes in memory, of what several processes share this one's part; 0 if it has ended."""
    try:
        found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{process}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()
