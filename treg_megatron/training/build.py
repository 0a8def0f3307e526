"""A checked recipe to the NeMo objects that run it."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.lightning.pytorch.callbacks import PEFT
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule
from nemo.lightning.pytorch.strategies.utils import RestoreConfig

from treg_megatron.config.schema import DataSection, OptimizerSection, ParallelSection, TrainSection
from treg_megatron.data.checks import can_share_prompts
from treg_megatron.distributed.cpu_redirect import is_cpu
from treg_megatron.distributed.launch import World
from treg_megatron.errors import UserError
from treg_megatron.models import policy as policies
from treg_megatron.objective import Objective
from treg_megatron.training.strategy import PolicyStrategy


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation, which Gemma is trained with."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": gelu_tanh}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

#: what needs a CUDA kernel, an extension module or a compiler that a CPU machine does not have
CPU_FIELDS = {
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
}


def policy_config(
    nemo_config: str,
    fields: dict[str, Any],
    parallel: ParallelSection,
    train: TrainSection,
    router_aux_loss: float = 0.0,
):
    """The NeMo config of the policy.

    Args:
        nemo_config: name of NeMo's config class, as ``families.nemo_config_class`` gives it.
        fields: its fields, as ``families.model_fields`` gives them.
        router_aux_loss: strength of the experts' load-balancing loss of one micro-batch beside the sum over its pairs.

    Raises:
        UserError: a layout that Megatron does not train the model in.
    """
    if fields.get("num_moe_experts") and parallel.tensor > 1 and not parallel.sequence:
        raise UserError(f"parallel.tensor={parallel.tensor} of a model with experts needs parallel.sequence=true")
    fields = dict(fields)
    vocabulary, activation = fields.pop("vocab_size"), ACTIVATIONS[fields.pop("activation")]
    schedule = {"variable_seq_lengths": True}
    if parallel.virtual_pipeline:
        # rows of one length (see data.PairData): the lengths of two neighbours' rows get mixed up where, as with two
        # stages, both neighbours are the same rank. Two stages need the overlapped exchange, one transfer at a time;
        # gloo sends in the background from memory that CUDA's allocator alone would keep alive
        schedule = {
            "variable_seq_lengths": False,
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
            "deallocate_pipeline_outputs": not is_cpu(),
        }
    # Megatron's name for an activation function that is a module of the layer spec; experts take none from there
    own_swiglu = is_cpu() and activation is F.silu and not fields.get("num_moe_experts")
    swiglu = {"use_te_activation_func": True} if own_swiglu else {}
    balancing = {"moe_aux_loss_coeff": router_aux_loss} if fields.get("num_moe_experts") else {}
    without_engine = {"apply_rope_fusion": False, "persist_layer_norm": False} if not policies.HAVE_TE else {}
    recompute = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[train.recompute]
    return getattr(policies, nemo_config.replace("Config", "PolicyConfig"))(
        **fields | without_engine | (CPU_FIELDS if is_cpu() else {}) | swiglu | recompute | schedule | balancing,
        activation_func=activation,
        true_vocab_size=vocabulary,
        vocab_size=math.ceil(vocabulary / parallel.tensor) * parallel.tensor,
        transformer_layer_spec=policies.layer_spec,
        data_step_fn=policies.data_step,
        forward_step_fn=policies.forward_step,
        cross_entropy_loss_fusion=False,
        calculate_per_token_loss=True,  # with pairs for tokens: the loss is the mean over the global batch's pairs
        moe_token_dispatcher_type="alltoall",  # what Megatron asks for with variable lengths, of dense models too
        params_dtype=DTYPES[train.precision],
        bf16=train.precision == "bf16",
    )


def shares_prompts(fields: dict[str, Any], parallel: ParallelSection, data: DataSection) -> bool:
    """Whether a pair's prompt stands in its row once; where ``data.share_prompts`` is null, on a CPU that can.

    Raises:
        UserError: it is asked for, and attention and rotary embedding are Transformer Engine's.
    """
    if data.share_prompts is None:
        return is_cpu() and not policies.HAVE_TE and can_share_prompts(fields, parallel, data)
    if data.share_prompts and policies.HAVE_TE:
        raise UserError(
            "data.share_prompts: Transformer Engine's attention, which is installed here, cannot continue one "
            "prompt twice; set it to false"
        )
    return data.share_prompts


def optimizer(section: OptimizerSection, train: TrainSection, steps: int) -> MegatronOptimizerModule:
    """AdamW on Megatron's distributed optimizer, linear warm-up, cosine to ``min_lr`` at the last step."""
    return MegatronOptimizerModule(
        config=OptimizerConfig(
            optimizer="adam",
            lr=section.lr,
            min_lr=section.min_lr,
            weight_decay=section.weight_decay,
            adam_beta1=section.beta1,
            adam_beta2=section.beta2,
            adam_eps=section.eps,
            clip_grad=section.clip_grad,
            use_distributed_optimizer=True,
            bf16=train.precision == "bf16",
            params_dtype=DTYPES[train.precision],
        ),
        lr_scheduler=CosineAnnealingScheduler(
            max_steps=steps,
            warmup_steps=round(section.warmup_fraction * steps),
            constant_steps=0,
            min_lr=section.min_lr,
        ),
    )


def strategy(parallel: ParallelSection, train: TrainSection, initial_weights: Path | None) -> PolicyStrategy:
    """Megatron parallelism under Lightning; ``initial_weights`` is the imported checkpoint of a fresh run."""
    return PolicyStrategy(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
        expert_model_parallel_size=parallel.expert,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        pipeline_dtype=DTYPES[train.precision],
        process_group_backend="gloo" if is_cpu() else "nccl",
        ddp=DistributedDataParallelConfig(
            use_distributed_optimizer=True, grad_reduce_in_fp32=True, check_for_nan_in_grad=False
        ),
        restore_config=RestoreConfig(path=str(initial_weights)) if initial_weights else None,
        ckpt_async_save=train.save_in_background,
        ckpt_load_directly_on_device=not is_cpu(),
        replace_progress_bar=False,
    )


def trainer(
    world: World, strategy: PolicyStrategy, train: TrainSection, steps: int, callbacks: list[pl.Callback]
) -> nl.Trainer:
    """A trainer that leaves logging, saving and validation to ``callbacks``."""
    return nl.Trainer(
        accelerator="cpu" if is_cpu() else "gpu",
        devices=world.local_size,
        num_nodes=world.nodes,
        strategy=strategy,
        plugins=nl.MegatronMixedPrecision(precision="bf16-mixed" if train.precision == "bf16" else "32"),
        max_steps=steps,
        max_epochs=1,  # one Lightning epoch: the order of the pairs counts the real ones
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )


def policy(
    config, objective: Objective, optim: MegatronOptimizerModule | None = None, adapters: PEFT | None = None
) -> policies.Policy:
    """The Lightning module that is trained, of the NeMo model class that goes with ``config``."""
    return policies.POLICIES[type(config)](config, objective, optim, adapters)
