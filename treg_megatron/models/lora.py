"""Low-rank adapters on the policy (LoRA, arXiv 2106.09685), with NeMo's PEFT.

The base weights are frozen and stay in the checkpoint that the run starts from; the run's checkpoints hold only the
adapters and their optimizer state. The reference model is the policy without adapters, and its log-probs are already
in the aligned dataset.
"""

from pathlib import Path

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.collections.llm.gpt.model.base import HAVE_TE
from nemo.collections.llm.peft import LoRA
from nemo.collections.llm.peft.lora import LoRALinear
from nemo.collections.llm.peft.utils import ParallelLinearAdapter
from nemo.lightning.resume import AdapterPath
from torch import nn

from treg_megatron.config.schema import LoraSection
from treg_megatron.errors import UserError

ATTENTION = ("linear_qkv", "linear_proj")
MLP = ("linear_fc1", "linear_fc2")
#: whose output is normalised where attention and MLP are followed by a norm: an adapter would be added after it
NORMALISED = ("linear_proj", "linear_fc2")


class PolicyLoRA(LoRA):
    """NeMo's LoRA, extended to work without Transformer Engine and with activation recompute."""

    def __call__(self, model: nn.Module) -> nn.Module:
        model = super().__call__(model)
        for module in model.modules():
            if isinstance(module, LanguageModelEmbedding):
                # recompute drops the gradient of a block whose input does not require one, such as frozen embeddings
                module.register_forward_hook(
                    lambda module, inputs, output: output.requires_grad_(torch.is_grad_enabled())
                )
        return model

    def transform(self, m: nn.Module, name: str | None = None, prefix: str | None = None) -> nn.Module:
        if HAVE_TE:
            return super().transform(m, name, prefix)
        match = self.match(m, name, prefix)
        if match is None:
            return m
        return LoRALinear(
            m,
            ParallelLinearAdapter(
                m.input_size,
                m.output_size,
                self.dim,
                base_linear_name=match[1],
                activation="identity",
                column_init_method=self.lora_A_init_method,
                row_init_method=self.lora_B_init_method,
                input_is_parallel=isinstance(m, RowParallelLinear),
                dropout=self.dropout,
                dropout_position=self.dropout_position,
                model_parallel_config=m.config,
                alpha=self.alpha,
                disable_sequence_parallel_comm=not m.config.sequence_parallel,
            ),
        )


def without_adapters(experts: bool, post_layer_norms: bool) -> tuple[str, ...]:
    """The layers that get no adapters in a model with experts, or with norms after attention and MLP."""
    return MLP * experts + NORMALISED * post_layer_norms


def adapters(section: LoraSection, config: TransformerConfig) -> PolicyLoRA | None:
    """The model transform, which is also the trainer callback that applies it; None if all weights are trained.

    Args:
        config: the policy's config, from ``build.policy_config``.

    Raises:
        UserError: a value out of range, or a layer that cannot have an adapter.
    """
    if section.rank is None:
        return None
    if section.rank < 1 or section.alpha <= 0 or not 0 <= section.dropout < 1:
        raise UserError(
            f"lora.rank={section.rank}, lora.alpha={section.alpha}, lora.dropout={section.dropout}: rank is at "
            f"least 1, alpha positive, dropout in [0, 1)"
        )
    known = (*ATTENTION, *MLP)
    if unknown := sorted(set(section.targets) - set(known)) or ([] if section.targets else ["nothing"]):
        raise UserError(f"lora.targets names {unknown[0]}; choose among {', '.join(known)}")
    if config.num_moe_experts and set(section.targets) & set(MLP):
        raise UserError(f"lora.targets: experts get no adapters; use [{', '.join(ATTENTION)}]")
    if getattr(config, "post_layer_norms", False) and set(section.targets) & set(NORMALISED):
        raise UserError(
            "lora.targets: this model normalises the output of linear_proj and linear_fc2, so an adapter on "
            "them could not be merged; use [linear_qkv, linear_fc1]"
        )
    return PolicyLoRA(
        target_modules=list(section.targets), dim=section.rank, alpha=section.alpha, dropout=section.dropout
    )


def resumed(checkpoint: Path, base: Path) -> Path:
    """What Lightning needs to resume a run with adapters: its checkpoint, and the path of the frozen weights."""
    return AdapterPath(str(checkpoint), base_model_path=base)
