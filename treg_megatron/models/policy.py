"""The policy: a NeMo GPT model whose output is the log-prob of each response token, and T-REG's loss on top.

The loss uses the extension points of NeMo's Megatron path: the data and forward steps of the model's config, the loss
reductions of the Lightning module, and ``GPTModel._postprocess``, where Megatron would turn hidden states into logits.
Tensor and pipeline parallelism, schedules, optimizer and checkpoints are NeMo's and Megatron's own.
"""

import contextlib
import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel as MegatronGPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.spec_utils import ModuleSpec
from nemo.collections import llm
from nemo.collections.llm.gpt.model import base as nemo_gpt
from nemo.collections.llm.gpt.model.base import HAVE_TE, transformer_engine_layer_spec
from nemo.lightning.megatron_parallel import MegatronLossReduction
from torch import Tensor

from treg_megatron.errors import UserError
from treg_megatron.kernels.core_attention import PackedRow
from treg_megatron.kernels.kernels import Kernels
from treg_megatron.models.head import response_logps
from treg_megatron.models.layers import torch_block_spec
from treg_megatron.models.rotary import add_local_rotary, scale_by_yarn
from treg_megatron.objective import Objective, Responses, preference_loss
from treg_megatron.utils.substitute import substituted


class ResponseTokens(NamedTuple):
    """The tokens that the last pipeline stage scores, passed in place of Megatron's labels."""

    rows: Tensor  # [n] int64, indices into the flattened [s * b, hidden] hidden states
    targets: Tensor  # [n] int64, token ids


class ResponseGPTModel(MegatronGPTModel):
    """Megatron's GPT model with fused vocabulary-parallel log-probs of response tokens instead of logits."""

    block_vocab: int | None = None  # vocabulary entries that the head projects at a time, see response_logps

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, *args, packed_seq_params: PackedSeqParams | None = None, **kwargs
    ) -> tuple:
        """Megatron's preprocessing; the rotary angles of a packed row, [t, 1, channels], are those of its position ids.

        Megatron's own way would cut the row into sequences in every layer, at lengths that it reads from the device.
        """
        embedded, angles, *others = super()._preprocess(
            input_ids, position_ids, *args, packed_seq_params=packed_seq_params, **kwargs
        )
        if isinstance(packed_seq_params, PackedRow):
            angles = angles[position_ids[0], 0]
        return embedded, angles, *others

    def _postprocess(
        self,
        hidden_states: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        labels: ResponseTokens | Tensor | None,
        *args,
        **kwargs,
    ) -> Tensor:
        """[s, b, hidden] -> [n] fp32 log-probs on the last stage, hidden states on the others."""
        if not self.post_process or not isinstance(labels, ResponseTokens):
            return super()._postprocess(hidden_states, input_ids, position_ids, labels, *args, **kwargs)
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden_states)
        tied = self.share_embeddings_and_output_weights
        # the head takes the output layer's weight and never calls the layer: what must happen before that, such as
        # waiting until the weight is gathered from the data-parallel ranks, must still happen
        for before in self.output_layer._forward_pre_hooks.values():
            before(self.output_layer, (hidden,))
        with (self.config.kernels.linear or contextlib.nullcontext)():
            return response_logps(
                hidden.flatten(0, 1).index_select(0, labels.rows),
                self.shared_embedding_or_output_weight() if tied else self.output_layer.weight,
                labels.targets,
                vocab_size=self.config.true_vocab_size,
                group=parallel_state.get_tensor_model_parallel_group(),
                logit_softcap=getattr(self.config, "final_logit_softcapping", None),
                block_vocab=self.block_vocab,
            )


@dataclass
class PolicyConfig:
    """Mix-in for NeMo's GPT configs: builds a :class:`ResponseGPTModel` with the same weights."""

    true_vocab_size: int = 0  # without padding
    torch_layers: bool = not HAVE_TE  # plain PyTorch layers in place of Transformer Engine's
    post_layer_norms: bool = False  # norms after attention and MLP, as in Gemma 2 and 3
    yarn: dict[str, Any] | None = None  # arguments of kernels.rotary.yarn_frequencies
    local_rotary_base: float | None = None  # of layers with a sliding window, as in Gemma 3; None: that of all layers
    kernels: Kernels = field(default_factory=Kernels.reference)  # for the plain PyTorch layers and the head

    nemo_model: ClassVar[type[llm.GPTModel]]  # the Lightning module that goes with the config
    megatron_model: ClassVar[type[MegatronGPTModel]] = ResponseGPTModel

    def configure_model(self, tokenizer, pre_process=None, post_process=None, vp_stage=None) -> ResponseGPTModel:
        """This stage's part of the model.

        Raises:
            UserError: ``cross_entropy_fusion_impl`` is Transformer Engine's.
        """
        if self.cross_entropy_fusion_impl == "te":
            raise UserError(
                "cross_entropy_fusion_impl=te: Transformer Engine's cross-entropy has given the gradient of one "
                "token to all of them (TransformerEngine issue 2139), where token rewards give each its own; "
                "leave it at native"
            )
        # NeMo hard-codes the class, and some families modify the model after building it (rotary scaling)
        with substituted(nemo_gpt, "MCoreGPTModel", self.megatron_model):
            model = super().configure_model(tokenizer, pre_process, post_process, vp_stage)
        if self.yarn is not None:
            scale_by_yarn(model, self.yarn)
        if self.local_rotary_base is not None:
            add_local_rotary(model, self.local_rotary_base)
        for module in model.modules():
            if isinstance(module, Router):
                # otherwise it multiplies the auxiliary loss by the token count, although we count pairs, not tokens
                module.calculate_per_token_loss = False
        return model


@cache
def policy_config_class(nemo_config: type[llm.GPTConfig], nemo_model: type[llm.GPTModel]) -> type[PolicyConfig]:
    """The policy's config dataclass, derived from NeMo's config dataclass and Lightning module of an architecture."""
    name = f"{nemo_config.__name__}OfPolicy"
    bases = (PolicyConfig, nemo_config)
    return dataclass(type(name, bases, {"__module__": __name__, "__doc__": None, "nemo_model": nemo_model}))


def layer_spec(config: PolicyConfig, vp_stage: int | None = None) -> ModuleSpec:
    """Transformer Engine's layers or plain PyTorch layers, as the config says."""
    if config.torch_layers:
        return torch_block_spec(config, config.kernels, vp_stage)
    return transformer_engine_layer_spec(config)


def data_step(iterator) -> dict[str, Any]:
    """Next micro-batch, moved to this rank's device. Every stage gets all its tensors: a few bytes per token."""
    batch = next(iterator)
    batch = batch[0] if isinstance(batch, tuple) else batch
    return {k: v.cuda(non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def forward_step(model, batch: dict[str, Any]) -> Tensor:
    """This stage's hidden states, or on the last stage the log-probs of the response tokens, [n] fp32."""
    longest, packed = batch.get("max_seqlen"), None
    if "spans" in batch and model.config.torch_layers:
        packed = PackedRow(
            "thd",
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            spans=batch["spans"],
            ends=batch.get("cu_seqlens"),
        )
    elif "spans" in batch:
        ends = batch["cu_seqlens"]
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            cu_seqlens_q_padded=ends,
            cu_seqlens_kv_padded=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
    return model(
        batch["tokens"],
        batch["position_ids"],
        labels=ResponseTokens(batch["rows"], batch["targets"]),
        packed_seq_params=packed,
    )


class StepResult(NamedTuple):
    """The result of a step over the global batch."""

    sums: dict[str, float]  # see treg_megatron.objective.means
    not_finite: list[str]  # ids of the pairs in micro-batches whose loss is not finite


class PreferenceLossReduction(MegatronLossReduction):
    """Loss of a micro-batch, and the metrics of a global batch.

    Megatron divides the gradients by the number of pairs in the global batch (``calculate_per_token_loss``, with pairs
    counted as tokens). The loss is thus the mean over pairs, however they are split over micro-batches, ranks and bins.
    """

    def __init__(self, objective: Objective):
        super().__init__()
        self.objective = objective
        self.result = StepResult({}, [])

    def forward(self, batch: dict[str, Any], logps: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        split = parallel_state.get_context_parallel_world_size() > 1
        responses = Responses(
            batch["lengths"],
            batch["segments"],
            batch["places"],
            batch["response_tokens"],
            parallel_state.get_context_parallel_group() if split else None,
            batch.get("positions"),
            batch.get("ranks"),
        )
        loss, sums = preference_loss(
            logps,
            batch.get("ref_logps"),
            batch.get("token_rewards"),
            responses,
            self.objective,
            batch.get("pair_weights"),
        )
        # Megatron sums the counts over context-parallel ranks, which hold the same pairs
        own = len(batch["lengths"]) // 2 if parallel_state.get_context_parallel_rank() == 0 else 0
        pairs = torch.full((), own, dtype=torch.int, device=loss.device)  # filled on the device, not copied to it
        return loss, pairs, {"sums": sums, "pair_ids": batch["pair_ids"]}

    def reduce(self, micro_batches: list[dict[str, Any]]) -> Tensor:
        """Mean loss over the global batch; runs on the last pipeline stage only."""
        group = parallel_state.get_data_parallel_group()
        names = list(micro_batches[0]["sums"])
        by_micro_batch = torch.stack([torch.stack(list(micro["sums"].values())) for micro in micro_batches])
        total = by_micro_batch.sum(dim=0)
        torch.distributed.all_reduce(total, group=group)
        sums = dict(zip(names, total.tolist(), strict=True))
        self.result = StepResult(sums, [])
        if not math.isfinite(sums["loss"]):
            finite = by_micro_batch[:, names.index("loss")].isfinite().tolist()
            mine = [
                pair for micro, ok in zip(micro_batches, finite, strict=True) if not ok for pair in micro["pair_ids"]
            ]
            gathered = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(gathered, mine, group=group)
            self.result = StepResult(sums, sum(gathered, []))
        return total[names.index("loss")] / max(sums["pairs"], 1.0)


class Policy:
    """Mix-in for NeMo's ``llm.GPTModel`` classes: training and validation use the objective's loss."""

    def __init__(self, config: llm.GPTConfig, objective: Objective, optim=None, adapters=None):
        super().__init__(config, optim=optim, model_transform=adapters)
        self.objective = objective

    @property
    def training_loss_reduction(self) -> PreferenceLossReduction:
        if self._training_loss_reduction is None:
            self._training_loss_reduction = PreferenceLossReduction(self.objective)
        return self._training_loss_reduction

    @property
    def validation_loss_reduction(self) -> PreferenceLossReduction:
        if self._validation_loss_reduction is None:
            self._validation_loss_reduction = PreferenceLossReduction(self.objective)
        return self._validation_loss_reduction


@cache
def policy_class(nemo_model: type[llm.GPTModel]) -> type[Policy]:
    """The policy's Lightning module, derived from NeMo's module of an architecture."""
    return type(f"{nemo_model.__name__}Policy", (Policy, nemo_model), {"__module__": __name__})
