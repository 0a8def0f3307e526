"""Peak memory and time of the log-prob head on one long pair, compared with full logits.

    python benchmarks/head_memory.py                 # 2 x 4096 tokens, vocabulary 128,256, bf16, hidden 1024

The head computes the logits of one vocabulary block at a time, and again in the backward pass. The baseline is
log_softmax of all logits at once, on as many rows as fit (--plain-rows), where both are timed. Peak memory is the most
allocated beyond inputs and outputs, including the gradients of hidden states and weight: on a CPU from the profiler's
record of allocations, on a GPU from the caching allocator.
"""

import argparse
import statistics
import time

import torch

from treg_megatron.models.head import response_logps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2 * 4096, help="response tokens of the pair")
    parser.add_argument("--plain-rows", type=int, default=1024, help="rows on which both are timed")
    parser.add_argument("--vocabulary", type=int, default=128_256)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = (torch.randn(arguments.vocabulary, arguments.hidden) / arguments.hidden**0.5).to(device, torch.bfloat16)
    weight.requires_grad_()

    hidden, targets, upstream = problem(arguments.rows, arguments, device)
    peak = peak_bytes(lambda: step(blockwise, hidden, weight, targets, upstream), device)
    print(
        f"blockwise: {arguments.rows} rows, vocabulary {arguments.vocabulary}, bf16: peak {peak / 1e9:.3f} GB "
        f"(full fp32 logits alone: {4 * arguments.rows * arguments.vocabulary / 1e9:.1f} GB)"
    )

    hidden, targets, upstream = problem(arguments.plain_rows, arguments, device)
    seconds = {blockwise: [], plain: []}
    for _ in range(arguments.repeats + 1):
        for head, taken in seconds.items():
            start = time.perf_counter()
            step(head, hidden, weight, targets, upstream)
            if device == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    ours, theirs = (statistics.median(taken[1:]) for taken in seconds.values())
    print(f"{arguments.plain_rows} rows forward and backward: blockwise {ours:.2f} s, full logits {theirs:.2f} s")
    print(f"figure head_peak_gb {peak / 1e9:.3f} GB")
    print(f"figure head_time_ratio {ours / theirs:.2f} ratio")


def problem(rows: int, arguments: argparse.Namespace, device: str) -> tuple[torch.Tensor, ...]:
    """Random hidden states [rows, hidden] in bf16, targets [rows], and upstream gradients of the log-probs [rows]."""
    hidden = torch.randn(rows, arguments.hidden).to(device, torch.bfloat16).requires_grad_()
    return hidden, torch.randint(arguments.vocabulary, (rows,), device=device), torch.randn(rows, device=device)


def blockwise(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probs [rows] from the project's head."""
    return response_logps(hidden, weight, targets, vocab_size=len(weight))


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Log-probs [rows] from full fp32 logits, the baseline."""
    return (hidden @ weight.T).float().log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)


def step(head, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor) -> None:
    """One forward and backward pass."""
    torch.autograd.grad((head(hidden, weight, targets) * upstream).sum(), (hidden, weight))


def peak_bytes(run, device: str) -> float:
    """Peak of the bytes allocated during ``run()``, beyond those allocated before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


if __name__ == "__main__":
    main()
