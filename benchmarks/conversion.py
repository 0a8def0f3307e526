"""Speed and peak memory of import and export on synthetic Llama checkpoints, compared with `cp` of the same bytes.

    python benchmarks/conversion.py                      # 1, 2 and 4 GB; needs 13 GB of disk and a few minutes

Each conversion runs in a separate process, after a `cp` of the same bytes, several times. A ratio is the seconds of cp
divided by ours, the median over repetitions. Neither waits for the disk (no fsync). Warm: the source was just read.
Cold: its pages were dropped from the cache (sync, then posix_fadvise DONTNEED), so it is read from disk.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 2048, 5632, 16, 4, 32000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 2, 4], metavar="GB", help="sizes of the models")
    parser.add_argument("--repeat", type=int, default=3, help="repetitions of each measurement")
    parser.add_argument("--folder", default=None, help="where to work (default: the system's temporary folder)")
    parser.add_argument(
        "--convert",
        nargs=4,
        metavar=("import|export", "SOURCE", "BASE", "OUTPUT"),
        help="run one conversion in this process and print its seconds and peak memory",
    )
    arguments = parser.parse_args()
    if arguments.convert:
        print(json.dumps(convert(*arguments.convert)))
        return
    ratios: dict[str, dict[str, list[float]]] = {"import": {}, "export": {}}
    peaks: dict[str, list[float]] = {"import": [], "export": []}
    print(f"{'GB':>5} {'':6} {'cache':5} {'cp s':>7} {'ours s':>7} {'ratio':>6} {'peak GB':>8}")
    for gigabytes in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            hf, checkpoint = Path(folder) / "hf", Path(folder) / "checkpoint"
            largest = synthetic_llama(hf, gigabytes)
            run("import", hf, hf, checkpoint)
            for kind, source in (("import", hf), ("export", checkpoint)):
                for cache in ("warm", "cold"):
                    pairs = [measure(kind, source, hf, Path(folder), cache) for _ in range(arguments.repeat)]
                    cp, ours, peak = (statistics.median(x) for x in zip(*pairs))
                    ratio = statistics.median(c / o for c, o, _ in pairs)
                    ratios[kind].setdefault(cache, []).append(ratio)
                    peaks[kind].append(peak)
                    print(
                        f"{gigabytes:5g} {kind:6} {cache:5} {cp:7.2f} {ours:7.2f} {ratio:6.2f} {peak:8.2f}", flush=True
                    )
    print(
        f"largest tensor {largest / 1e9:.2f} GB; peak memory over all sizes: "
        + ", ".join(f"{kind} {min(p):.2f} to {max(p):.2f} GB" for kind, p in peaks.items())
    )
    for kind in ("export", "import"):
        for cache in ("warm", "cold"):
            print(f"{kind} {cache}: " + ", ".join(f"{r:.2f}" for r in ratios[kind][cache]))
    for kind in ("export", "import"):
        print(f"figure {kind}_vs_cp {min(statistics.median(r) for r in ratios[kind].values()):.2f} ratio")
    print(f"figure convert_peak_gb {max(max(p) for p in peaks.values()):.2f} GB")


def synthetic_llama(folder: Path, gigabytes: float) -> int:
    """Write a random bf16 Llama of at least the given size; return the bytes of its largest tensor.

    Models of different sizes differ only in the number of layers.
    """
    import torch

    from treg_megatron.checkpoint.buffers import as_bytes
    from treg_megatron.checkpoint.safetensors_stream import INDEX_FILE, ShardWriter, index_of, plan_shards
    from treg_megatron.checkpoint.to_hf import SHARD_BYTES, planned_tensors
    from treg_megatron.models.families import family_of, model_fields

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }

    def planned():
        return planned_tensors(family_of(config), model_fields(config), torch.bfloat16)

    while sum(t.nbytes for t in planned()) < gigabytes * 1e9:
        config["num_hidden_layers"] += 1
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shards = plan_shards(planned(), SHARD_BYTES)
    largest = max(t.nbytes for t in planned())
    noise = as_bytes(torch.randn(largest // 2).to(torch.bfloat16))
    for name, shard in shards.items():
        with ShardWriter(folder / name, shard) as writer:
            for tensor in shard:
                writer.write(tensor.name, [noise[: tensor.nbytes]])
    if len(shards) > 1:
        (folder / INDEX_FILE).write_text(json.dumps(index_of(shards)))
    return largest


def measure(kind: str, source: Path, base: Path, folder: Path, cache: str) -> tuple[float, float, float]:
    """Seconds of cp, seconds and peak GB of the conversion; the output of both is deleted."""
    prepare(source, cache)
    start = time.monotonic()
    subprocess.run(["cp", "-r", source, folder / "copy"], check=True)
    cp = time.monotonic() - start
    shutil.rmtree(folder / "copy")
    prepare(source, cache)
    ours, peak = run(kind, source, base, folder / "output")
    shutil.rmtree(folder / "output")
    return cp, ours, peak


def prepare(source: Path, cache: str) -> None:
    """Read the source into the page cache (warm) or drop it from there (cold), after writing back dirty pages."""
    os.sync()
    for path in source.rglob("*"):
        if path.is_file() and cache == "warm":
            subprocess.run(["cp", path, "/dev/null"], check=True)
        elif path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(kind: str, source: Path, base: Path, output: Path) -> tuple[float, float]:
    """Run one conversion in a separate process; return its seconds, without Python's start-up, and its peak GB."""
    command = [sys.executable, __file__, "--convert", kind, source, base, output]
    done = subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True)
    return tuple(json.loads(done.stdout))


def convert(kind: str, source: str, base: str, output: str) -> tuple[float, float]:
    """Run one conversion in this process; return its seconds and the process's peak GB."""
    from treg_megatron.checkpoint.from_hf import import_checkpoint
    from treg_megatron.checkpoint.to_hf import export_checkpoint

    start = time.monotonic()
    if kind == "import":
        import_checkpoint(source, output)
    else:
        export_checkpoint(source, base, output)
    seconds = time.monotonic() - start
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
