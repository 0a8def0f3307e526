"""A reference model split over ranks by Megatron (any TP x PP) as a :class:`~treg_megatron.labelling.scoring.Scorer`.

It uses the policy's own model class on the checkpoint that training starts from, so its log-probs are exactly those
that training compares with. Sequences are packed under a token budget, and the plain PyTorch layers compute a prefix
that several of them share once (``shared_prefixes``). Transformer Engine's attention gives a packed sequence the keys
of its own tokens alone, so on its layers every sequence is computed whole. Forward passes run through Megatron's
pipeline schedule. Every rank of a replica scores the same sequences in the same order and receives the results.

Importing this module is cheap; NeMo is imported when a model is built.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from treg_megatron.data.alignment import score_positions
from treg_megatron.data.collate import packed_row, shared_row
from treg_megatron.distributed.launch import (
    RankInfo,
    destroy_process_group,
    init_process_group,
    on_rank_zero,
    rank_info,
)
from treg_megatron.distributed.layout import require_split
from treg_megatron.errors import UserError
from treg_megatron.labelling.scoring import ScoredSequence
from treg_megatron.labelling.scoring.shared_prefixes import portions, shared_lengths

logger = logging.getLogger(__name__)

_PATIENCE = 3600.0  # seconds: rank 0 may read hundreds of gigabytes while the others wait


def replica(here: RankInfo, tensor: int, pipeline: int) -> tuple[int, int, bool]:
    """The replica of the model that this rank belongs to, the number of replicas, and whether it is its first rank.

    Ranks are in Megatron's order: tensor-parallel neighbours first, pipeline stages last.

    Raises:
        UserError: the number of ranks is not a multiple of tensor x pipeline.
    """
    if here.size % (tensor * pipeline):
        raise UserError(
            f"label.tensor={tensor} x label.pipeline={pipeline} does not divide {here.size} processes; "
            f"start a multiple of {tensor * pipeline} with torchrun or srun"
        )
    copies = here.size // (tensor * pipeline)
    return here.rank // tensor % copies, copies, here.rank < tensor * copies and here.rank % tensor == 0


class MegatronScorer:
    """The reference model of a Megatron checkpoint, on all ranks of the job.

    Args:
        checkpoint: a checkpoint, or a run's folder for its newest one.
        tensor: tensor-parallel size of one replica.
        pipeline: pipeline-parallel size of one replica; remaining ranks hold further replicas.
        dtype: float32 or bfloat16, the precision of weights and hidden states; the softmax is always fp32.
        batch_tokens: tokens in one forward pass; a longer sequence gets a pass of its own.

    Raises:
        UserError: there is no complete checkpoint, or the ranks or the model do not allow this split.
    """

    def __init__(self, checkpoint: str | Path, tensor: int, pipeline: int, dtype: str, batch_tokens: int):
        from treg_megatron.checkpoint.layout import find_checkpoint, read_metadata
        from treg_megatron.models.families import model_fields

        self._checkpoint = folder = find_checkpoint(Path(checkpoint))
        fields = model_fields(read_metadata(folder).hf_config)
        require_split(fields, tensor, pipeline, "label")
        self.max_length, self.vocab_size = fields["seq_length"], fields["vocab_size"]
        self.batch_tokens = batch_tokens
        _start_ranks(tensor, pipeline)
        self._policy = _load(folder, tensor, pipeline, {"float32": "fp32", "bfloat16": "bf16"}[dtype])
        self._shares = self._policy.config.torch_layers
        if not self._shares:
            logger.warning("Transformer Engine's attention cannot share prefixes: every sequence is computed whole")

    def require_weights_of(self, hf: str | Path) -> None:
        """Require that the checkpoint equals a Hugging Face folder bit for bit: labels name it as their reference.

        All ranks must call this; rank 0 alone reads the files.

        Raises:
            UserError: the models differ, or the folder holds none.
        """
        on_rank_zero(lambda: _require_same_model(self._checkpoint, Path(hf)))

    def close(self) -> None:
        """Destroy the process group once no sequence is left; all ranks must call this."""
        destroy_process_group()

    def score(
        self, sequences: Sequence[ScoredSequence], scored: Callable[[int, int], None] = lambda sequences, tokens: None
    ) -> list[np.ndarray]:
        """See :meth:`treg_megatron.labelling.scoring.Scorer.score`."""
        results: list[np.ndarray | None] = [None] * len(sequences)
        for portion in portions([sequence.read for sequence in sequences], self.batch_tokens, self._shares):
            members = [sequences[i] for i in portion]
            ends = np.cumsum([len(member.response_ids) for member in members])
            for i, logps in zip(portion, np.split(self._score_packed(members), ends[:-1]), strict=True):
                results[i] = logps
            scored(len(portion), sum(member.length for member in members))
        return results

    @torch.inference_mode()
    def _score_packed(self, members: list[ScoredSequence]) -> np.ndarray:
        """[n] fp32 log-probs of the response tokens of all members, on every rank of the replica."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from treg_megatron.distributed.stage_shapes import with_known_shapes

        batch = _packed(members, self._shares)
        outputs = with_known_shapes(get_forward_backward_func())(
            forward_step_func=self._forward,
            data_iterator=iter([batch]),
            model=[self._policy.module],
            num_microbatches=1,
            seq_length=batch["tokens"].shape[1],
            micro_batch_size=1,
            forward_only=True,
        )
        if parallel_state.is_pipeline_last_stage():
            logps = outputs[0]["logps"]
        else:
            logps = torch.empty(len(batch["targets"]), dtype=torch.float32, device="cuda")
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            torch.distributed.broadcast(
                logps,
                parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        return logps.cpu().numpy()

    def _forward(self, batches: Iterator[dict[str, Any]], _: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        from treg_megatron.models.policy import data_step, forward_step

        output = forward_step(self._policy, data_step(batches))
        return output, lambda logps, **_: (logps.new_zeros(()), {"logps": logps})


def _packed(members: list[ScoredSequence], share: bool) -> dict[str, Any]:
    """A micro-batch for ``treg_megatron.models.policy.forward_step``; see ``treg_megatron.data.collate.collate``."""
    read = [member.read for member in members]
    scored = [score_positions(len(member.prompt_ids), len(member.response_ids)) for member in members]
    positions = [np.arange(part.start, part.stop) for part in scored]
    sequences = [torch.from_numpy(tokens) for tokens in read]
    row = shared_row(sequences, positions, shared_lengths(read)) if share else packed_row(sequences, positions)
    return row | {"targets": torch.tensor([token for member in members for token in member.response_ids])}


def _start_ranks(tensor: int, pipeline: int) -> None:
    from treg_megatron.distributed.cpu_redirect import use_cpu
    from treg_megatron.utils.imports import heavy_imports

    if not torch.cuda.is_available():
        use_cpu()  # before Megatron is imported
    with heavy_imports():
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    init_process_group(rank_info(), _PATIENCE)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor, pipeline)
        model_parallel_cuda_manual_seed(1)


def _require_same_model(checkpoint: Path, hf: Path) -> None:
    from treg_megatron.checkpoint.compare import compare

    if different := compare(checkpoint, hf).different:
        raise UserError(
            f"{checkpoint} is not the model of {hf}: {different[0]} differs; name the checkpoint "
            "imported from that folder, or the folder exported from that checkpoint"
        )


def _load(checkpoint: Path, tensor: int, pipeline: int, precision: str) -> Any:
    from treg_megatron.utils.imports import heavy_imports

    with heavy_imports():
        import treg_megatron.models.build  # noqa: F401
        from treg_megatron.checkpoint.policy import load_policy

    return load_policy(checkpoint, tensor, pipeline, precision=precision)
