"""Builds the policy of a validated recipe: its NeMo config and its Lightning module."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from nemo.lightning.pytorch.callbacks import PEFT
from nemo.lightning.pytorch.optim import MegatronOptimizerModule

from treg_megatron.config.schema import DataSection, ParallelSection, TrainSection
from treg_megatron.distributed.cpu_redirect import is_cpu, uses_cpu_kernels
from treg_megatron.distributed.layout import can_share_prompts
from treg_megatron.errors import UserError
from treg_megatron.kernels.kernels import Kernels, cpu_kernels
from treg_megatron.models import policy as policies
from treg_megatron.models.families import family_of, model_fields
from treg_megatron.models.router_without_te import define_te_general_gemm
from treg_megatron.objective import Objective


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU with the tanh approximation, as in Gemma."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": F.silu, "gelu_pytorch_tanh": gelu_tanh}


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


#: config fields that turn off what needs a CUDA kernel, an extension module or a compiler
CPU_FIELDS = {
    "apply_rope_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
}


def policy_config(
    hf_config: dict[str, Any],
    parallel: ParallelSection,
    train: TrainSection,
    router_aux_loss: float = 0.0,
    kernels: Kernels | None = None,
) -> policies.PolicyConfig:
    """The policy's NeMo config, from the model's config.json.

    Args:
        router_aux_loss: coefficient of a micro-batch's load-balancing loss, added to the loss summed over its pairs.
        kernels: kernels of the plain PyTorch layers; by default the set that ``TREG_CPU_KERNELS`` names on a CPU, and
            the GPU's set elsewhere.

    Raises:
        UserError: the architecture is not supported, or Megatron cannot train it with this layout.
    """
    family, fields = family_of(hf_config), model_fields(hf_config)
    if fields.get("num_moe_experts") and parallel.tensor > 1 and not parallel.sequence:
        raise UserError(f"parallel.tensor={parallel.tensor} of a model with experts needs parallel.sequence=true")
    family.require_schedule(parallel)
    if fields.get("num_moe_experts"):
        define_te_general_gemm()
    if kernels is None:
        kernels = cpu_kernels() if uses_cpu_kernels() else Kernels.gpu()
    vocabulary, activation = fields.pop("vocab_size"), ACTIVATIONS[fields.pop("activation")]
    schedule = {
        "variable_seq_lengths": True,
        "batch_p2p_sync": False,  # against a race of torch's before 1.13 (its pull request 82450)
    }
    if parallel.virtual_pipeline:
        # all rows have the same length (see PairData), as this schedule wants it. With two stages, the previous and the
        # next one are the same rank, which needs overlapped, unbatched P2P communication. gloo sends asynchronously
        # from memory that only CUDA's allocator would keep alive
        schedule = {
            "variable_seq_lengths": False,
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
            "deallocate_pipeline_outputs": not is_cpu(),
        }
    balancing = {"moe_aux_loss_coeff": router_aux_loss} if fields.get("num_moe_experts") else {}
    torch_layers = takes_torch_layers(family.post_layer_norms, train.precision)
    if torch_layers:
        of_layers = {"apply_rope_fusion": False, "persist_layer_norm": False}
        if fields.get("num_moe_experts"):
            of_layers |= {"moe_grouped_gemm": False, "moe_permute_fusion": False}  # Transformer Engine's
    else:
        of_layers = {
            "apply_rope_fusion": True,  # Megatron's own reads a row's lengths from the GPU, twice a layer
            "tp_comm_overlap": parallel.tensor_overlap,
        }
    recompute = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[train.recompute]
    return policies.policy_config_class(*family.nemo_classes(hf_config))(
        **fields | of_layers | (CPU_FIELDS if is_cpu() else {}) | recompute | schedule | balancing,
        kernels=kernels,
        torch_layers=torch_layers,
        post_layer_norms=family.post_layer_norms,
        activation_func=activation,
        true_vocab_size=vocabulary,
        vocab_size=math.ceil(vocabulary / parallel.tensor) * parallel.tensor,
        transformer_layer_spec=policies.layer_spec,
        data_step_fn=policies.data_step,
        forward_step_fn=policies.forward_step,
        cross_entropy_loss_fusion=False,
        calculate_per_token_loss=True,  # we count pairs as tokens: the loss is the mean over the global batch's pairs
        moe_token_dispatcher_type="alltoall",  # Megatron requires it with variable lengths, even for dense models
        params_dtype=DTYPES[train.precision],
        bf16=train.precision == "bf16",
    )


def takes_torch_layers(post_layer_norms: bool, precision: str) -> bool:
    """Whether the layers are plain PyTorch: without Transformer Engine, in fp32, and for Gemma 2 and 3.

    Transformer Engine attends to packed sequences in half precision only. NeMo's own Gemma 2 layers do not support
    packed sequences, ignore the sliding window if no mask is passed, and apply it in the odd layers, where the model
    has it in the even ones. Its Gemma 3 takes no context parallelism.
    """
    return not policies.HAVE_TE or precision == "fp32" or post_layer_norms


def require_overlapping_layers(config: policies.PolicyConfig, parallel: ParallelSection) -> None:
    """Require that the layers can do what ``parallel.tensor_overlap`` asks for.

    Raises:
        UserError: they are plain PyTorch.
    """
    if parallel.tensor_overlap and config.torch_layers:
        why = "it is not installed" if not policies.HAVE_TE else "fp32 and Gemma take PyTorch's"
        raise UserError(f"parallel.tensor_overlap needs Transformer Engine's layers, and {why}: set it to false")


def shares_prompts(fields: dict[str, Any], parallel: ParallelSection, data: DataSection) -> bool:
    """Whether a row holds each pair's prompt only once. If ``data.share_prompts`` is null: on a CPU, where possible.

    Raises:
        UserError: ``data.share_prompts`` is true, but attention and rotary embedding are Transformer Engine's.
    """
    if data.share_prompts is None:
        return uses_cpu_kernels() and not policies.HAVE_TE and can_share_prompts(fields, parallel, data)
    if data.share_prompts and policies.HAVE_TE:
        raise UserError(
            "data.share_prompts: Transformer Engine's attention, which is installed here, cannot continue one "
            "prompt twice; set it to false"
        )
    return data.share_prompts


def build_policy(
    config: policies.PolicyConfig,
    objective: Objective,
    optim: MegatronOptimizerModule | None = None,
    adapters: PEFT | None = None,
) -> policies.Policy:
    """The Lightning module to train, derived from the NeMo model class that belongs to ``config``."""
    return policies.policy_class(config.nemo_model)(config, objective, optim, adapters)
