"""Text to aligned streams, against Megatron-LM's own preprocessing of the same file; reading; memory; packing.

    python benchmarks/indexing.py --megatron MEGATRON_LM --tokenizer MODEL

MEGATRON_LM is a checkout of NVIDIA's Megatron-LM whose tools/preprocess_data.py is run; MODEL a Hugging Face folder.
Both programs tokenise prompt, chosen and rejected of the same JSONL with the same number of worker processes, turn by
turn. What a program takes for a hundred pairs, its start, is subtracted. Ours also renders the chat template, checks
every row, maps token rewards and hashes what it writes.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FEW = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron", type=Path, help="checkout of Megatron-LM; left out, nothing is compared")
    parser.add_argument("--tokenizer", required=True, type=Path, help="Hugging Face folder of a tokenizer")
    parser.add_argument("--pairs", type=int, default=8000, help="pairs to index from text")
    parser.add_argument("--most", type=int, default=1_000_000, help="pairs of the largest file in the memory test")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.megatron:
            compare(arguments, Path(folder))
        memory(arguments, Path(folder))
    fill()


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    for pairs in (FEW, arguments.pairs):
        write_text(folder / f"{pairs}.jsonl", pairs)
    ours, theirs = [], []
    for _ in range(arguments.rounds):
        ours.append(net(lambda pairs: ours_on(folder / f"{pairs}.jsonl", arguments), arguments.pairs))
        theirs.append(net(lambda pairs: megatron_on(folder / f"{pairs}.jsonl", arguments), arguments.pairs))
    tokens = json.loads((folder / f"{arguments.pairs}-ours.manifest.json").read_text())["tokens"]
    print(f"{arguments.pairs} pairs, {tokens} tokens in the streams, {arguments.workers} workers, seconds of each "
          f"round: ours {', '.join(f'{s:.1f}' for s in ours)}; Megatron-LM {', '.join(f'{s:.1f}' for s in theirs)}")
    print(f"figure index_rate {tokens / np.median(ours):.0f} tokens/s")
    print(f"figure index_vs_megatron {np.median(np.array(theirs) / np.array(ours)):.2f} ratio")


def net(run, pairs: int) -> float:
    seconds = {}
    for count in (FEW, pairs):
        start = time.perf_counter()
        run(count)
        seconds[count] = time.perf_counter() - start
    return seconds[pairs] - seconds[FEW]


def ours_on(path: Path, arguments: argparse.Namespace) -> None:
    call([ROOT / "tools" / "index_pairs.py", "--labelled", path,
          "--output", path.with_name(f"{path.stem}-ours"), "--tokenizer", arguments.tokenizer,
          "--workers", arguments.workers], ROOT)


def megatron_on(path: Path, arguments: argparse.Namespace) -> None:
    call([arguments.megatron / "tools" / "preprocess_data.py", "--input", path, "--output-prefix",
          path.with_name(f"{path.stem}-megatron"), "--json-keys", "prompt", "chosen", "rejected", "--append-eod",
          "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", arguments.tokenizer, "--workers",
          arguments.workers], arguments.megatron)


def call(command: list, package: Path) -> None:
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"})
    if result.returncode:
        sys.exit(f"{command[0]} failed:\n{result.stderr[-2000:]}")


def write_text(path: Path, pairs: int) -> None:
    """Made-up English of about the length of UltraFeedback's: prompts of about 150 words, responses of about 200."""
    words = " ".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))).split()
    chance = random.Random(0)

    def text(median: int) -> str:
        return " ".join(chance.choices(words, k=min(max(round(chance.lognormvariate(np.log(median), 0.6)), 3), 1200)))

    with open(path, "w", encoding="utf-8") as file:
        for i in range(pairs):
            chosen, rejected = text(200), text(200)
            file.write(json.dumps({"prompt": f"{i} {text(150)}", "chosen": chosen, "rejected": rejected,
                                   "chosen_spans": [[0, len(chosen), 0.25]],
                                   "rejected_spans": [[0, len(rejected), -0.25]]}) + "\n")


def memory(arguments: argparse.Namespace, folder: Path) -> None:
    """Peak memory of indexing labelled pairs, in a process each, and the rate of reading what the largest gave."""
    from treg_megatron.streams import open_streams

    counts = [n for n in (10_000, 100_000, 1_000_000) if n <= arguments.most]
    for count in counts:
        write_labelled(folder / f"{count}.parquet", count)
        child = os.fork()
        if child == 0:
            index_one(folder / f"{count}.parquet", folder / str(count), arguments.tokenizer)
            os._exit(0)
        _, status, usage = os.wait4(child, 0)
        assert status == 0
        print(f"figure index_peak_{count} {usage.ru_maxrss / 1e6:.2f} GB")
        (folder / f"{count}.parquet").unlink()
    streams = open_streams(folder / str(counts[-1]))
    order = np.random.default_rng(0).permutation(len(streams))[:200_000].tolist()
    start = time.perf_counter()
    for pair in order:
        streams[pair]
    print(f"figure read_rate {len(order) / (time.perf_counter() - start):.0f} pairs/s")


def index_one(labelled: Path, prefix: Path, tokenizer: Path) -> None:
    from treg_megatron.indexing import index
    from treg_megatron.recipe import load_recipe, section

    index(section(load_recipe(overrides=[f"index.labelled={labelled}", f"index.output={prefix}",
                                         f"index.tokenizer={tokenizer}"]), "index"))


def write_labelled(path: Path, pairs: int) -> None:
    """Labelled pairs of about 60 tokens a sequence, written some at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    chance = np.random.default_rng(0)
    prompt, response = 20, 40
    with pq.ParquetWriter(path, pa.schema({
            "pair_id": pa.string(), **{f"{side}_{name}": pa.list_(kind) for side in ("chosen", "rejected")
                                       for name, kind in (("tokens", pa.int32()), ("token_rewards", pa.float32()),
                                                          ("ref_logprobs", pa.float32()))}})) as writer:
        for first in range(0, pairs, 10_000):
            rows = min(10_000, pairs - first)
            asked = chance.integers(0, 1000, (rows, prompt), dtype=np.int32)
            columns = [pa.array([str(first + i) for i in range(rows)])]
            for _ in range(2):
                tokens = np.concatenate([asked, chance.integers(0, 1000, (rows, response), dtype=np.int32)], axis=1)
                values = chance.uniform(-0.5, 0, (2, rows * response)).astype(np.float32)
                starts = np.arange(rows + 1, dtype=np.int32)
                columns.append(pa.ListArray.from_arrays(starts * (prompt + response), tokens.ravel()))
                columns += [pa.ListArray.from_arrays(starts * response, v) for v in values]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=writer.schema))


def fill() -> None:
    """Bins of 8192 tokens in global batches of 128 pairs, of made-up lengths, log-normal."""
    from treg_megatron.packing import BinOrder

    lengths = np.minimum(np.random.default_rng(0).lognormal(np.log(850), 0.55, 60_000), 4096).astype(np.int64)
    order = BinOrder(lengths, 8192, 128, 0, 1, micro_batches=1, seed=1)
    start = time.perf_counter()
    bins = [bin for step in range(order.steps) for bin in order.bins(step)]
    print(f"figure pack_rate {len(lengths) / (time.perf_counter() - start):.0f} pairs/s")
    print(f"figure pack_fill {lengths.sum() / (8192 * len(bins)):.3f} ratio")


if __name__ == "__main__":
    main()
