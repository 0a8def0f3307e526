"""Log-probs of response tokens from hidden states: the only rows projected, a chunk at a time, over a split vocabulary.

Logits of a long sequence are the largest tensor of preference training (2 x 4096 tokens x 128k words: 4 GB in fp32,
several times over in a naive backward pass). Here at most one chunk of them exists at a time: the forward pass keeps the
log-normaliser of each row, the backward pass projects the chunk again and turns it into its gradient in place.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 128 << 20  # fp32 logits of one chunk on one rank


def response_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    logit_softcap: float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """log softmax(hidden @ weight.T)[target], row by row, with a gradient that honours each row's own upstream one.

    Args:
        hidden: [rows, hidden] of any floating dtype, the same on every rank of ``group``. Its gradient is this rank's
            part only: the caller brought ``hidden`` in through a region whose backward sums over the group.
        weight: [vocabulary / ranks, hidden], this rank's rows of the output embedding; may hold padding rows at the
            end of the whole vocabulary, which take no probability.
        targets: [rows] int64, ids of the whole vocabulary.
        vocab_size: words of the vocabulary without padding.
        group: the tensor-parallel group that splits the vocabulary; None for a whole one.
        logit_softcap: c of Gemma 2's c * tanh(logits / c), or None.
        chunk_rows: rows projected at a time; by default as many as ``CHUNK_BYTES`` hold.

    Returns:
        [rows] fp32; softmax and reductions are fp32 whatever the dtype of ``hidden``.
    """
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    first_word = rank * weight.shape[0]
    words = max(0, min(weight.shape[0], vocab_size - first_word))
    chunk_rows = chunk_rows or max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    return _ResponseLogps.apply(hidden, weight, targets - first_word, words, group if size > 1 else None,
                                logit_softcap, chunk_rows)


class _ResponseLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, local_targets, words, group, softcap, chunk_rows):
        rows = hidden.shape[0]
        log_normaliser = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        target_logits = torch.zeros(rows, dtype=torch.float32, device=hidden.device)
        here = (local_targets >= 0) & (local_targets < words)
        for start in range(0, rows, chunk_rows):
            chunk = slice(start, start + chunk_rows)
            logits = _logits(hidden[chunk], weight, words, softcap)
            own = here[chunk].nonzero().squeeze(1)
            target_logits[chunk][own] = logits[own, local_targets[chunk][own]]
            largest = logits.amax(dim=1) if words else torch.full_like(log_normaliser[chunk], -torch.inf)
            if group is not None:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            normaliser = logits.sub_(largest[:, None]).exp_().sum(dim=1)
            if group is not None:
                dist.all_reduce(normaliser, group=group)
            log_normaliser[chunk] = normaliser.log().add_(largest)
        if group is not None:
            dist.all_reduce(target_logits, group=group)
        ctx.save_for_backward(hidden, weight, local_targets, log_normaliser)
        ctx.words, ctx.softcap, ctx.chunk_rows = words, softcap, chunk_rows
        # a micro-batch that is one chunk keeps its probabilities: one chunk is what the head may hold anyway
        only_chunk = 0 < rows <= chunk_rows and softcap is None and any(ctx.needs_input_grad)
        ctx.probabilities = logits.div_(normaliser[:, None]) if only_chunk else None
        return target_logits - log_normaliser

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, local_targets, log_normaliser = ctx.saved_tensors
        words, softcap, chunk_rows = ctx.words, ctx.softcap, ctx.chunk_rows
        grad_hidden = torch.empty_like(hidden)
        one_chunk = hidden.shape[0] <= chunk_rows
        grad_weight = None if one_chunk else torch.zeros_like(weight, dtype=torch.float32)
        here = (local_targets >= 0) & (local_targets < words)
        for start in range(0, hidden.shape[0], chunk_rows):
            chunk = slice(start, start + chunk_rows)
            slope = None
            if ctx.probabilities is not None:
                probabilities, ctx.probabilities = ctx.probabilities, None
            else:
                logits = _logits(hidden[chunk], weight, words, softcap)
                slope = None if softcap is None else 1 - (logits / softcap) ** 2
                probabilities = logits.sub_(log_normaliser[chunk, None]).exp_()
            grad_logits = probabilities.mul_(-grad[chunk, None])
            own = here[chunk].nonzero().squeeze(1)
            grad_logits[own, local_targets[chunk][own]] += grad[chunk][own]
            if slope is not None:
                grad_logits *= slope
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden[chunk] = grad_logits @ weight[:words]
            if one_chunk:
                grad_weight = grad_logits.T @ hidden
                if words < len(weight):
                    grad_weight = F.pad(grad_weight, (0, 0, 0, len(weight) - words))
            elif weight.dtype == torch.float32:
                grad_weight[:words].addmm_(grad_logits.T, hidden[chunk])
            else:  # a sum over chunks is kept in fp32 whatever the weight's precision
                grad_weight[:words] += grad_logits.T @ hidden[chunk]
        grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, words: int, softcap: float | None) -> Tensor:
    logits = (hidden @ weight[:words].T).float()
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)
