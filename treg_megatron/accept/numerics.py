"""The log-prob head on this device against float64, its peak memory and its time, as one line of JSON."""

import json
import time

import torch

from treg_megatron.models.head import response_logps

ROWS, HIDDEN = 4096, 1024
VOCABULARY, CPU_VOCABULARY = 128_256, 16_000
#: largest accepted difference from float64, of a gradient relative to its largest entry, by precision
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}


def main() -> None:
    """Print a line of JSON: errors by precision, bytes at the peak and seconds of a forward and backward pass."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measured = {f"head_error_{str(dtype).removeprefix('torch.')}": error_of(dtype, device) for dtype in TOLERANCE}
    print(json.dumps(measured | memory_and_time(device)))


def error_of(dtype: torch.dtype, device: str) -> float:
    """Largest difference of log-probs (nats) and gradients (relative) from float64, on a small problem."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 64, generator=generator).to(dtype)
    weight = torch.randn(5000, 64, generator=generator).div(8).to(dtype)
    targets = torch.randint(0, 5000, (300,), generator=generator)
    x, w = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    expected = (x @ w.T).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    expected.sum().backward()
    a, b = (tensor.to(device).requires_grad_() for tensor in (hidden, weight))
    found = response_logps(a, b, targets.to(device), 5000, block_vocab=700)
    found.sum().backward()
    errors = [(found.cpu().double() - expected).abs().max().item()]
    for ours, theirs in ((a, x), (b, w)):
        assert ours.grad is not None and theirs.grad is not None
        errors.append(((ours.grad.cpu().double() - theirs.grad).abs().max() / theirs.grad.abs().max()).item())
    return max(errors)


def memory_and_time(device: str) -> dict[str, float]:
    """Of 4096 response tokens in bf16, forward and backward; memory on a GPU only."""
    vocabulary = VOCABULARY if device == "cuda" else CPU_VOCABULARY
    hidden = torch.randn(ROWS, HIDDEN, device=device).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, HIDDEN, device=device) / HIDDEN**0.5).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (ROWS,), device=device)

    def step() -> None:
        torch.autograd.grad(response_logps(hidden, weight, targets, vocabulary).sum(), (hidden, weight))

    step()
    found = {}
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        found["head_peak_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return found | {"head_ms": 1000 * (time.perf_counter() - start)}


if __name__ == "__main__":
    main()
