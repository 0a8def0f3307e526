"""The blockwise log-prob head against log_softmax of full logits."""

import pytest
import torch

from treg_megatron.models import head
from treg_megatron.models.head import response_logps

ROWS, HIDDEN, VOCAB = 13, 8, 29


def problem(entries: int = VOCAB, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(entries, HIDDEN, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    upstream = torch.randn(ROWS, generator=generator)
    return hidden, weight, targets, upstream


def plain(hidden, weight, targets, softcap=None):
    logits = hidden.double() @ weight[:VOCAB].double().T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize("block_vocab", [1, 4, VOCAB, 100])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_bytes", [0, head.CHUNK_BYTES], ids=["projected again", "kept"])
def test_equals_log_softmax_with_a_gradient_for_each_token(block_vocab, padding, softcap, chunk_bytes, monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", chunk_bytes)
    results = []
    for f in (
        lambda h, w, t: response_logps(h, w, t, VOCAB, logit_softcap=softcap, block_vocab=block_vocab),
        lambda h, w, t: plain(h, w, t, softcap),
    ):
        hidden, weight, targets, upstream = problem(VOCAB + padding)
        logps = f(hidden, weight, targets)
        (logps * upstream).sum().backward()
        results.append((logps.double(), hidden.grad, weight.grad))
    for ours, theirs in zip(*results):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_padding_entries_get_no_probability_and_no_gradient():
    hidden, weight, targets, _ = problem(VOCAB + 3)
    response_logps(hidden, weight, targets, VOCAB).sum().backward()
    assert torch.equal(weight.grad[VOCAB:], torch.zeros(3, HIDDEN))


def test_bf16_reduces_in_fp32():
    hidden, weight, targets, _ = problem(dtype=torch.bfloat16)
    logps = response_logps(hidden, weight, targets, VOCAB, block_vocab=4)
    assert logps.dtype == torch.float32
    logps.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    rounded_logits = (hidden @ weight.T).float()
    torch.testing.assert_close(logps, rounded_logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1))


def test_logits_are_kept_in_one_chunk_or_not_at_all(monkeypatch):
    projected = []
    product = head._logits
    monkeypatch.setattr(head, "_logits", lambda *a: projected.append(1) or product(*a))
    for softcap, chunk_bytes in ((None, 4 * ROWS * VOCAB), (2.0, 8 * ROWS * VOCAB)):
        for missing, products in ((0, 8), (1, 16)):
            monkeypatch.setattr(head, "CHUNK_BYTES", chunk_bytes - missing)
            hidden, weight, targets, _ = problem()
            projected.clear()
            response_logps(hidden, weight, targets, VOCAB, logit_softcap=softcap, block_vocab=4).sum().backward()
            assert len(projected) == products


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk_bytes", [0, head.CHUNK_BYTES], ids=["projected again", "kept"])
def test_no_shape_depends_on_the_targets(softcap, chunk_bytes, monkeypatch):
    """On a GPU the host would wait for such a shape in every block, forward and backward; meta tensors have none."""
    monkeypatch.setattr(head, "CHUNK_BYTES", chunk_bytes)
    hidden, weight, targets, _ = (x.detach().to("meta") for x in problem())
    hidden.requires_grad_(), weight.requires_grad_()
    response_logps(hidden, weight, targets, VOCAB, logit_softcap=softcap, block_vocab=4).sum().backward()
    assert hidden.grad.is_meta and weight.grad.is_meta


@pytest.mark.parametrize("rows, entries", [(4094, 2048), (4096, 2048), (1, 8388608), (10**6, 256), (0, 8388608)])
def test_blocks_on_a_gpu_are_aligned(rows, entries):
    assert head.entries_of_a_block(rows, on_cpu=False) == entries


def test_a_second_backward_pass_gives_the_same():
    hidden, weight, targets, upstream = problem()
    loss = (response_logps(hidden, weight, targets, VOCAB, block_vocab=4) * upstream).sum()
    for first, second in zip(
        torch.autograd.grad(loss, (hidden, weight), retain_graph=True), torch.autograd.grad(loss, (hidden, weight))
    ):
        torch.testing.assert_close(first, second)


def test_no_rows():
    hidden, weight, targets, _ = problem()
    logps = response_logps(hidden[:0], weight, targets[:0], VOCAB)
    logps.sum().backward()
    assert logps.shape == (0,) and torch.equal(weight.grad, torch.zeros_like(weight))
