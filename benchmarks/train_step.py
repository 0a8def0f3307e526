"""Training throughput in pairs per second, compared with TRL's DPOTrainer on the same weights and pairs.

    python benchmarks/train_step.py                                   # random Llama of 56.6M, the demo's pairs
    python benchmarks/train_step.py --model MODEL --pairs pairs.json  # a Hugging Face folder, your pairs

Baselines: TRL from PyPI, in a virtual environment that this script creates, with reference log-probs precomputed and
with the reference in memory; our trainer with one optimisation switched off at a time; our trainer without T-REG
(alpha 0). All are loaded at once, each in its own process, and take steps in turn, so that a slow phase of the machine
affects all equally. Figures are ratios of medians over the same steps: same global batch, same micro-batch, AdamW, fp32
on a CPU, bf16 on a GPU. `train_gemm_share` is the FLOP rate of forward + backward over that of a square matrix product
measured between the steps; on a GPU, the rate of the entire step over the card's peak (MFU) is printed too.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKERS = Path(__file__).resolve().parent / "workers"
TRL = "trl==1.16.0"
SHARED = "data.share_prompts=true"
OURS = {
    "treg": [SHARED],
    "dpo": [SHARED, "objective.alpha=0"],
    "products by MKL": [SHARED, "bench.products=mkl"],  # the default on Intel's processors
    "prompts computed twice": [],  # like all runs below
    "padded rows": ["data.layout=padded"],
    "padded, Megatron's attention": ["data.layout=padded", "bench.attention=local"],
    "logits of all tokens": ["bench.head=whole"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="Hugging Face folder (default: a random Llama of 56.6M with the demo's tokenizer)"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=ROOT / "runs" / "smollm2_135m" / "smollm2",
        help="folder of a tokenizer with a chat template, for the random model (default: that of `make demo`)",
    )
    parser.add_argument("--pairs", type=Path, default=ROOT / "demo" / "pairs" / "train.jsonl", help="preference pairs")
    parser.add_argument("--max-length", type=int, default=512, help="longest sequence; longer pairs are left out")
    parser.add_argument("--steps", type=int, default=9, help="timed steps per run, after two untimed ones")
    parser.add_argument("--batch", type=int, default=8, help="pairs per step")
    parser.add_argument("--micro-batch", type=int, default=4, help="pairs per forward pass, in ours and TRL")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="of the GPU in bf16, for MFU (default: H100 SXM)"
    )
    parser.add_argument(
        "--trl-python",
        type=Path,
        default=ROOT / "runs" / "trl-venv" / "bin" / "python",
        help="interpreter of an environment with TRL, which is created if it does not exist",
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=None,
        help="names of the runs to include (default: all); each holds a model in memory, all at the same time",
    )
    parser.add_argument(
        "--prepared",
        type=Path,
        help="folder that keeps labels and checkpoint for further benchmarks of the same "
        "model and pairs (default: a temporary one)",
    )
    arguments = parser.parse_args()
    if not arguments.model and not arguments.tokenizer.is_dir():
        parser.error(f"{arguments.tokenizer} does not exist: run `make demo` once, or name another --tokenizer")
    make_trl(arguments.trl_python)
    with contextlib.ExitStack() as stack:
        measure(arguments, arguments.prepared or Path(stack.enter_context(tempfile.TemporaryDirectory())))


def make_trl(python: Path) -> None:
    """Create a virtual environment with TRL, this environment's torch, and the newest transformers that TRL accepts."""
    if python.exists():
        return
    print(f"creating {python.parent.parent} with {TRL}", flush=True)
    folder = python.parent.parent
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    try:
        packages = [f"torch=={version('torch').partition('+')[0]}", "accelerate", "datasets", "jinja2", TRL]
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    except subprocess.CalledProcessError:
        shutil.rmtree(folder)
        raise


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    """Prepare the inputs, time the steps of all runs in turn, and print the report."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(arguments.threads),
        "PYTHONPATH": str(ROOT),
        "TREG_THREADS": str(arguments.threads),
    }
    summary = folder / "prepared.txt"
    if not summary.exists():
        folder.mkdir(parents=True, exist_ok=True)
        prepare = subprocess.run(
            [
                sys.executable,
                WORKERS / "prepare.py",
                folder,
                str(arguments.model or ""),
                str(arguments.tokenizer or ""),
                arguments.pairs,
                str(arguments.max_length),
            ],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        summary.write_text(prepare.stdout.strip().splitlines()[-1])
    print(summary.read_text(), flush=True)
    sizes = [
        "--batch",
        str(arguments.batch),
        "--micro-batch",
        str(arguments.micro_batch),
        "--steps",
        str(arguments.steps + 2),
        "--max-length",
        str(arguments.max_length),
    ]
    commands = {name: [sys.executable, WORKERS / "ours.py", folder, *sizes, *extra] for name, extra in OURS.items()}
    commands["TRL, precomputed"] = [arguments.trl_python, WORKERS / "trl_dpo.py", folder, *sizes, "--precompute"]
    commands["TRL, reference in memory"] = [arguments.trl_python, WORKERS / "trl_dpo.py", folder, *sizes]
    if arguments.only:
        commands = {name: command for name, command in commands.items() if name in arguments.only}
    workers = {name: Worker(name, command, environment, folder) for name, command in commands.items()}
    try:
        for worker in workers.values():
            worker.wait_until_ready()
        samples = {name: [] for name in workers}
        for step in range(arguments.steps + 2):
            for name, worker in workers.items():
                sample = worker.step()
                if step >= 2:
                    samples[name].append(sample)
    finally:
        for worker in workers.values():
            worker.process.kill()
    report(samples, arguments)


class Worker:
    """A training process that takes one step per request and reports its duration."""

    def __init__(self, name: str, command: list, environment: dict[str, str], folder: Path):
        self.name, self.log = name, folder / f"{name.replace(' ', '_')}.log"
        self.process = subprocess.Popen(
            [str(c) for c in command],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(self.log, "w"),
            text=True,
        )

    def wait_until_ready(self) -> None:
        """Wait for the process to reach its first step."""
        self._read()

    def step(self) -> dict[str, float]:
        """Take a step; return the worker's report, with the duration as ``seconds``."""
        with contextlib.suppress(BrokenPipeError):  # _read reports why it ended
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, float]:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        killed = " (killed, perhaps out of memory: select fewer runs with --only)" if self.process.wait() == -9 else ""
        raise SystemExit(f"{self.name} ended{killed}:\n{self.log.read_text()[-3000:]}")


def report(samples: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> None:
    """Print the table of all runs and the figures."""
    medians = {name: statistics.median(s["seconds"] for s in taken) for name, taken in samples.items()}
    ours = samples["treg"]
    tokens = statistics.mean(s["tokens"] for s in ours)  # without padding, even for runs that compute it
    print(f"\n{'':32} {'median s/step':>14} {'pairs/s':>9} {'tokens/s':>9} {'x treg':>8}")
    for name, seconds in medians.items():
        print(
            f"{name:32} {seconds:14.3f} {arguments.batch / seconds:9.2f} {tokens / seconds:9.0f} "
            f"{seconds / medians['treg']:8.2f}"
        )
    share = statistics.median(s["flops"] / s["forward_backward_seconds"] / s["gemm_rate"] for s in ours)
    print(
        f"\n{arguments.steps} steps of {arguments.batch} pairs, {tokens:.0f} tokens per step on {ours[0]['device']}, "
        f"matrix product {statistics.median(s['gemm_rate'] for s in ours) / 1e9:.0f} GFLOP/s"
    )
    if ours[0]["device"] != "cpu":
        mfu = statistics.median(s["flops"] / s["seconds"] for s in ours) / (1e12 * arguments.peak_tflops)
        print(f"MFU {mfu:.3f} of {arguments.peak_tflops:g} TFLOP/s")
    figures = {"train_vs_trl_precomputed": "TRL, precomputed", "train_vs_trl_resident": "TRL, reference in memory"}
    for figure, opponent in figures.items():
        if opponent in medians:
            print(f"figure {figure} {medians[opponent] / medians['treg']:.2f} ratio")
    print(f"figure train_gemm_share {share:.2f} ratio")
    if "dpo" in medians:
        print(f"figure treg_over_dpo {medians['treg'] / medians['dpo']:.3f} ratio")


if __name__ == "__main__":
    main()
