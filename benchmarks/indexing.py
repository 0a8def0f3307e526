"""Indexing throughput compared with Megatron-LM's preprocessing of the same file; read rate, peak memory, packing.

    python benchmarks/indexing.py --megatron MEGATRON_LM --tokenizer MODEL --pairs pairs.jsonl

MEGATRON_LM is a checkout of NVIDIA's Megatron-LM, whose tools/preprocess_data.py is run. MODEL is a Hugging Face
folder. Both programs read the same JSONL with the same tokenizer and number of worker processes, alternating. The time
for a hundred pairs is subtracted as start-up time. Megatron-LM's tool runs in two modes:

    sequences   the two sequences of each pair, prompt and response, which is what training needs; the chat template is
                applied beforehand, and the resulting ids are compared with ours
    texts       prompt, chosen and rejected, each once, which training could not use directly

Ours renders the chat template, finds the boundary between prompt and response, maps token rewards, validates every
record and hashes its output. The texts are those of --pairs, repeated. In each repetition some words are replaced by
new ones; their share is that of new words in the second half of --pairs.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FEW = 100
PARTS = ("compare", "text", "labelled", "fill")
SEQUENCES, TEXTS = ("chosen_sequence", "rejected_sequence"), ("prompt_text", "chosen", "rejected")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron", type=Path, help="checkout of Megatron-LM (default: no comparison)")
    parser.add_argument("--tokenizer", required=True, type=Path, help="Hugging Face folder of a tokenizer")
    parser.add_argument(
        "--pairs",
        type=Path,
        default=ROOT / "demo" / "pairs" / "train.jsonl",
        help="preference pairs of any format, the source of texts and lengths",
    )
    parser.add_argument("--count", type=int, default=8000, help="pairs to index from text")
    parser.add_argument("--most", type=int, default=1_000_000, help="pairs of the largest file in the memory test")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--parts",
        nargs="+",
        default=PARTS,
        choices=PARTS,
        help="what to measure: text and labelled are the peak memory of indexing such a file; fill is packing",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if "compare" in arguments.parts and arguments.megatron:
            compare(arguments, Path(folder))
        if "text" in arguments.parts:
            memory("text", write_short_text, 2, arguments, Path(folder))
        if "labelled" in arguments.parts:
            memory("labelled", write_labelled, 1, arguments, Path(folder))
            reading(Path(folder) / "labelled-streams")
    if "fill" in arguments.parts:
        fill(arguments)


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Time our indexing and both modes of Megatron-LM's tool in turn, and print the figures."""
    for count in (FEW, arguments.count):
        write_text(folder / f"{count}.jsonl", count, arguments)
    programs = {
        "ours": lambda text: ours_on(text, arguments),
        "Megatron-LM, sequences": lambda text: megatron_on(text, SEQUENCES, arguments),
        "Megatron-LM, texts": lambda text: megatron_on(text, TEXTS, arguments),
    }
    seconds: dict[str, list[np.ndarray]] = {name: [] for name in programs}
    for _ in range(arguments.rounds):
        for name, run in programs.items():
            few, many = (timed(run, folder / f"{count}.jsonl") for count in (FEW, arguments.count))
            seconds[name].append(many - few)
            print(f"  {name:<24}{seconds[name][-1][0]:6.2f} s, {seconds[name][-1][1]:6.2f} s of CPU", flush=True)
    manifest = json.loads((folder / f"{arguments.count}-ours.manifest.json").read_text())
    print(f"{manifest['pairs']} pairs, {manifest['tokens']} tokens in the dataset, {arguments.workers} workers")
    same_ids(folder, arguments)
    ours, sequences, texts = (np.array(each).T for each in seconds.values())
    print(f"figure index_rate {manifest['tokens'] / np.median(ours[0]):.0f} tokens/s")
    for name, theirs in (("index_vs_megatron", sequences), ("index_vs_megatron_texts", texts)):
        for clock, ratios in zip(("", "_cpu"), theirs / ours):
            print(f"figure {name}{clock} {np.median(ratios):.2f} ratio")


def timed(run, text: Path) -> np.ndarray:
    """[2] wall-clock seconds, and CPU seconds of all processes, which do not depend on other load on the machine."""
    start = time.perf_counter(), cpu_of_children()
    run(text)
    return np.array([time.perf_counter() - start[0], cpu_of_children() - start[1]])


def cpu_of_children() -> float:
    """CPU seconds of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def same_ids(folder: Path, arguments: argparse.Namespace) -> None:
    """Compare the ids of the rejected sequences: Megatron-LM's tool writes an index only for its last key."""
    from treg_megatron.data.indexed import IndexedReader
    from treg_megatron.data.streams import open_streams

    ours = open_streams(folder / f"{arguments.count}-ours")
    theirs = folder / f"{arguments.count}-{SEQUENCES[1]}_{SEQUENCES[1]}_document"
    theirs = IndexedReader(Path(f"{theirs}.bin"), Path(f"{theirs}.idx"))
    same = sum(np.array_equal(ours[i].rejected_tokens, theirs[i]) for i in range(len(ours)))
    print(f"  the same ids in {same} of {len(theirs)} rejected sequences")


def ours_on(path: Path, arguments: argparse.Namespace) -> None:
    """Index a file with our tool."""
    call(
        [
            ROOT / "tools" / "index_pairs.py",
            "--labelled",
            path,
            "--output",
            path.with_name(f"{path.stem}-ours"),
            "--tokenizer",
            arguments.tokenizer,
            "--workers",
            arguments.workers,
        ],
        ROOT,
    )


def megatron_on(path: Path, keys: tuple[str, ...], arguments: argparse.Namespace) -> None:
    """Index the given keys of a file with Megatron-LM's tool."""
    call(
        [
            arguments.megatron / "tools" / "preprocess_data.py",
            "--input",
            path,
            "--output-prefix",
            path.with_name(f"{path.stem}-{keys[-1]}"),
            "--json-keys",
            *keys,
            "--append-eod",
            "--tokenizer-type",
            "HuggingFaceTokenizer",
            "--tokenizer-model",
            arguments.tokenizer,
            "--workers",
            arguments.workers,
        ],
        arguments.megatron,
    )


def call(command: list, package: Path) -> None:
    """Run a Python script with ``package`` on its path; exit with its last output if it fails."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"},
    )
    if result.returncode:
        sys.exit(f"{command[0]} failed:\n{result.stderr[-2000:]}")


def write_text(path: Path, count: int, arguments: argparse.Namespace) -> None:
    """Write pairs with a reward per response, and the texts that Megatron-LM's tool reads."""
    from treg_megatron.data.pairs import read_pairs
    from treg_megatron.tokenizer.chat import load_tokenizer

    tokenizer, source, chance = load_tokenizer(arguments.tokenizer), list(read_pairs(arguments.pairs)), random.Random(0)
    repeated_share, share = new_words(source), 0.0

    def renewed(text: str) -> str:
        return " ".join(changed(word) if chance.random() < share else word for word in text.split(" "))

    def changed(word: str) -> str:
        at = chance.randint(0, len(word))
        return word[:at] + "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=2)) + word[at:]

    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            pair = source[i % len(source)]
            share = 0.0 if i < len(source) else repeated_share
            messages = [message._replace(content=renewed(message.content)) for message in pair.messages]
            chosen, rejected = renewed(pair.chosen), renewed(pair.rejected)
            prompt = tokenizer.decode(tokenizer.encode_prompt(messages))
            file.write(
                json.dumps(
                    {
                        "id": i,
                        "prompt": [message.as_dict() for message in messages],
                        "chosen": chosen,
                        "rejected": rejected,
                        "chosen_spans": [[0, len(chosen), 0.25]],
                        "rejected_spans": [[0, len(rejected), -0.25]],
                        "prompt_text": prompt,
                        "chosen_sequence": prompt + chosen,
                        "rejected_sequence": prompt + rejected,
                    }
                )
                + "\n"
            )
    print(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB, {repeated_share:.1%} of the words changed in repetitions")


def new_words(pairs: list) -> float:
    """Share of the words in the second half of the pairs that have not occurred before."""
    words = [
        word
        for pair in pairs
        for text in (*(m.content for m in pair.messages), pair.chosen, pair.rejected)
        for word in text.split()
    ]
    half, seen, new = len(words) // 2, set(), 0
    for i, word in enumerate(words):
        new += i >= half and word not in seen
        seen.add(word)
    return new / (len(words) - half)


def memory(name: str, write, workers: int, arguments: argparse.Namespace, folder: Path) -> None:
    """Measure the peak memory of the largest indexing process on files of growing length."""
    for count in (n for n in (10_000, 100_000, 1_000_000) if n <= arguments.most):
        write(folder / name, count)
        child = os.fork()
        if child == 0:
            index_one(folder / name, folder / f"{name}-streams", arguments.tokenizer, workers)
            peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
            print(f"figure index_{name}_peak_{count} {peak / 1e6:.2f} GB", flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


def reading(prefix: Path) -> None:
    """Measure pairs per second in random order, as training reads them."""
    from treg_megatron.data.streams import open_streams

    streams = open_streams(prefix)
    order = np.random.default_rng(0).permutation(len(streams))[:200_000].tolist()
    start = time.perf_counter()
    for pair in order:
        streams[pair]
    print(f"figure read_rate {len(order) / (time.perf_counter() - start):.0f} pairs/s")


def index_one(labelled: Path, prefix: Path, tokenizer: Path, workers: int) -> None:
    """Index a file in this process, with worker processes."""
    from treg_megatron.config.recipe import load_recipe, section
    from treg_megatron.labelling.indexing import index

    index(
        section(
            load_recipe(
                overrides=[
                    f"index.labelled={labelled}",
                    f"index.output={prefix}",
                    f"index.tokenizer={tokenizer}",
                    f"index.workers={workers}",
                ]
            ),
            "index",
        )
    )


def write_short_text(path: Path, pairs: int) -> None:
    """Write pairs of a few words with token rewards, so that memory per pair stands out."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(pairs):
            file.write(
                json.dumps(
                    {
                        "prompt": f"{i}?",
                        "chosen": "yes",
                        "rejected": "no",
                        "chosen_spans": [[0, 3, 0.25]],
                        "rejected_spans": [[0, 2, -0.25]],
                    }
                )
                + "\n"
            )


def write_labelled(path: Path, pairs: int) -> None:
    """Write labelled pairs of 60 tokens per sequence, in batches."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    chance = np.random.default_rng(0)
    prompt, response = 20, 40
    with pq.ParquetWriter(
        path,
        pa.schema(
            {
                "pair_id": pa.string(),
                **{
                    f"{side}_{name}": pa.list_(kind)
                    for side in ("chosen", "rejected")
                    for name, kind in (
                        ("tokens", pa.int32()),
                        ("token_rewards", pa.float32()),
                        ("ref_logprobs", pa.float32()),
                    )
                },
            }
        ),
    ) as writer:
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


def fill(arguments: argparse.Namespace) -> None:
    """Measure packing into bins of 8192 tokens, in global batches of 128 pairs with lengths drawn from --pairs."""
    from treg_megatron.data.packing import BinOrder
    from treg_megatron.data.pairs import read_pairs
    from treg_megatron.tokenizer.chat import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer)
    lengths = []
    for pair in read_pairs(arguments.pairs):
        responses = [tokenizer.encode_response(pair.messages, text) for text in (pair.chosen, pair.rejected)]
        lengths.append(2 * len(tokenizer.encode_prompt(pair.messages)) + sum(map(len, responses)))
    real = np.array(lengths)
    drawn = np.random.default_rng(0).choice(real[real <= 8192], 60_000)
    print(
        f"{len(real)} real pairs of {real.min()} to {real.max()} tokens, median {int(np.median(real))}; "
        f"{(real > 8192).sum()} longer than a bin left out; 60,000 drawn"
    )
    order = BinOrder(drawn, 8192, 128, 0, 1, micro_batches=1, seed=1)
    start = time.perf_counter()
    bins = [bin for step in range(order.steps) for bin in order.bins(step)]
    print(f"figure pack_rate {len(drawn) / (time.perf_counter() - start):.0f} pairs/s")
    print(f"figure pack_fill {drawn.sum() / (8192 * len(bins)):.3f} ratio")


if __name__ == "__main__":
    main()
