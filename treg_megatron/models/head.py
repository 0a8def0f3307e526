"""Fused vocabulary-parallel linear log-probs: output projection and log-softmax in one blockwise operation.

The logits of a long sequence are the largest tensor in preference training (2 x 4096 tokens x 128k vocabulary entries:
4 GB in fp32, and several times that in a naive backward pass). Here only the hidden states that predict a response
token are projected, and at most one chunk of logits exists at a time. The forward pass runs over blocks of the
vocabulary with an online softmax (Milakov and Gimelshein, arXiv:1805.02867) and keeps one log-normaliser per token. The
backward pass recomputes each block and overwrites it with its gradient, as in Cut Cross-Entropy (Wijmans et al.,
arXiv:2411.09009). If all blocks together fit into one chunk, the forward pass keeps their exponentials instead, which
saves a quarter of the head's FLOPs. Each block of the weight gradient is one matrix product over all tokens, written
once. Splitting the vocabulary over ranks costs three all-reduces of one float per token, whatever the vocabulary size.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_BYTES = 384 << 20  # fp32 logits that a rank may keep between the forward and the backward pass
BLOCK_BYTES = 32 << 20  # fp32 logits of one block on one rank: keeps a GPU busy and fits its last-level cache
CPU_BLOCK_BYTES = 8 << 20  # the last-level cache of a CPU is smaller


def response_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    logit_softcap: float | None = None,
    block_vocab: int | None = None,
) -> Tensor:
    """log softmax(hidden @ weight.T)[target] of each token; differentiable, with one upstream gradient per token.

    Args:
        hidden: [rows, hidden] of any floating dtype, the same on every rank of ``group``. Its gradient is this rank's
            part only; the caller's tensor-parallel region sums it over the group in its backward pass.
        weight: [vocabulary / ranks, hidden], this rank's part of the output embedding. Padding entries of the
            vocabulary at its end get no probability.
        targets: [rows] int64, ids in the full (unsplit) vocabulary.
        vocab_size: number of vocabulary entries without padding.
        group: the tensor-parallel group that splits the vocabulary; None if it is not split.
        logit_softcap: c of Gemma 2's c * tanh(logits / c), or None.
        block_vocab: vocabulary entries projected at a time; by default as many as fit into a block.

    Returns:
        [rows] fp32, nats; softmax and reductions are fp32 whatever the dtype of ``hidden``.
    """
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    first_id = rank * weight.shape[0]
    entries = max(0, min(weight.shape[0], vocab_size - first_id))
    block_vocab = block_vocab or entries_of_a_block(hidden.shape[0], hidden.is_cpu)
    return _ResponseLogps.apply(
        hidden, weight, targets - first_id, entries, group if size > 1 else None, logit_softcap, block_vocab
    )


def entries_of_a_block(rows: int, on_cpu: bool) -> int:
    """How many vocabulary entries of ``rows`` tokens fit into a block; on a GPU a multiple of 128, because bf16 matrix
    products whose sizes are not multiples of 8 leave the tensor cores' fast paths."""
    if on_cpu:
        return max(256, CPU_BLOCK_BYTES // (4 * max(1, rows)))
    return max(256, BLOCK_BYTES // (4 * max(1, rows)) // 128 * 128)


class _ResponseLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, local_targets, entries, group, softcap, block_vocab):
        rows = hidden.shape[0]
        largest = torch.full((rows,), -torch.inf, dtype=torch.float32, device=hidden.device)
        normaliser = torch.zeros_like(largest)  # sum of exp(logit - largest) over the entries so far
        target_logits = torch.zeros_like(largest)
        blocks = _blocks(entries, block_vocab) if rows else []
        to_keep = 4 * rows * entries * (1 if softcap is None else 2)  # including the slopes of a soft-cap
        keep, ctx.kept = any(ctx.needs_input_grad) and to_keep <= CHUNK_BYTES, []
        scratch = None if keep else _scratch(hidden, entries, block_vocab)
        for block in blocks:
            logits = _logits(hidden, weight[block], softcap, scratch(block) if scratch else None)
            slope = _slope(logits, softcap) if keep else None
            own, columns = _targets_in(block, local_targets)
            target_logits = torch.where(own, logits.gather(1, columns).squeeze(1), target_logits)
            before, largest = largest, torch.maximum(largest, logits.amax(dim=1))
            exponentials = logits.sub_(largest[:, None]).exp_()
            normaliser = normaliser * (before - largest).exp_() + exponentials.sum(dim=1)
            if keep:
                ctx.kept.append((exponentials, largest, slope))
        if group is not None:
            over_ranks = largest.clone()
            dist.all_reduce(over_ranks, op=dist.ReduceOp.MAX, group=group)
            normaliser *= (largest - over_ranks).exp_()
            largest = over_ranks
            dist.all_reduce(normaliser, group=group)
            dist.all_reduce(target_logits, group=group)
        log_normaliser = normaliser.log().add_(largest)
        ctx.save_for_backward(hidden, weight, local_targets, log_normaliser)
        ctx.entries, ctx.softcap, ctx.block_vocab = entries, softcap, block_vocab
        return target_logits - log_normaliser

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, local_targets, log_normaliser = ctx.saved_tensors
        blocks = _blocks(ctx.entries, ctx.block_vocab) if len(hidden) else []
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.empty_like(weight)
        grad_weight[ctx.entries if len(hidden) else 0 :] = 0
        scratch = None if ctx.kept else _scratch(hidden, ctx.entries, ctx.block_vocab)
        for block in blocks:
            if ctx.kept:
                exponentials, largest, slope = ctx.kept.pop(0)
                grad_logits = exponentials.mul_((largest - log_normaliser).exp_().mul_(-grad)[:, None])
            else:
                logits = _logits(hidden, weight[block], ctx.softcap, scratch(block) if scratch else None)
                slope = _slope(logits, ctx.softcap)
                grad_logits = logits.sub_(log_normaliser[:, None]).exp_().mul_(-grad[:, None])
            own, columns = _targets_in(block, local_targets)
            grad_logits.scatter_add_(1, columns, torch.where(own, grad, 0.0)[:, None])
            if slope is not None:
                grad_logits *= slope
            grad_logits = grad_logits.to(weight.dtype)
            if grad_logits.dtype == torch.float32:
                grad_hidden.addmm_(grad_logits, weight[block])
            else:  # accumulate over blocks in fp32, whatever the model's precision
                grad_hidden += grad_logits @ weight[block]
            torch.mm(grad_logits.T, hidden, out=grad_weight[block])
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None, None


def _blocks(entries: int, block_vocab: int) -> list[slice]:
    return [slice(start, min(start + block_vocab, entries)) for start in range(0, entries, block_vocab)]


def _targets_in(block: slice, local_targets: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each row's target lies in the block, bool [rows], and the target's column in it, [rows, 1]; some column
    for the other rows. To list the rows instead, a GPU would have to tell the host their number, and wait."""
    columns = local_targets - block.start
    last = block.stop - block.start - 1
    return (columns >= 0) & (columns <= last), columns.clamp(0, last)[:, None]


def _scratch(like: Tensor, entries: int, block_vocab: int) -> Callable[[slice], Tensor]:
    """A function that returns a [rows, entries] buffer for a block; all share memory, with rows, dtype and device of
    ``like``."""
    memory = like.new_empty(len(like) * min(entries, block_vocab))
    return lambda block: memory[: len(like) * (block.stop - block.start)].view(len(like), -1)


def _slope(logits: Tensor, softcap: float | None) -> Tensor | None:
    """Derivative of the capped logits with respect to the uncapped ones."""
    return None if softcap is None else 1 - (logits / softcap) ** 2


def _logits(hidden: Tensor, weight: Tensor, softcap: float | None, out: Tensor | None) -> Tensor:
    logits = (torch.mm(hidden, weight.T) if out is None else torch.mm(hidden, weight.T, out=out)).float()
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
