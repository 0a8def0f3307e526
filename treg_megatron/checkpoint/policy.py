"""Policy model with the weights of a checkpoint, outside of a training run.

The only module of this package that needs NeMo, which it imports on use: conversion works without it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from treg_megatron.checkpoint.layout import MODEL_PREFIX, WEIGHTS, read_metadata
from treg_megatron.checkpoint.torch_dist import CONTENT_METADATA, TorchDistReader
from treg_megatron.config.recipe import load_recipe, section

if TYPE_CHECKING:
    from treg_megatron.models.policy import Policy


def load_policy(
    checkpoint: Path,
    tensor: int = 1,
    pipeline: int = 1,
    expert: int = 1,
    sequence: bool = False,
    precision: str = "fp32",
) -> "Policy":
    """Load a checkpoint's policy on this rank's device, in evaluation mode; its ``module`` is this rank's part of
    Megatron's model.

    The model is built and loaded as for training. Megatron's ``parallel_state`` must have been initialised with the
    same sizes.

    Args:
        checkpoint: a complete checkpoint.
        tensor, pipeline, expert, sequence: the parallel layout, as in section ``parallel`` of a recipe.
        precision: fp32 or bf16, of the weights; they are never in memory in another one.

    Raises:
        UserError: the checkpoint is incomplete, or the model does not support the layout.
    """
    from megatron.core import dist_checkpointing

    from treg_megatron.models.build import DTYPES, build_policy, policy_config
    from treg_megatron.objective import Objective

    hf_config = read_metadata(checkpoint).hf_config
    recipe = load_recipe(
        overrides=[
            f"train.precision={precision}",
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            f"parallel.sequence={sequence}",
        ]
    )
    config = policy_config(hf_config, section(recipe, "parallel"), section(recipe, "train"))
    # what NeMo's strategy fills in
    config.tensor_model_parallel_size = config.expert_tensor_parallel_size = tensor
    config.pipeline_model_parallel_size, config.pipeline_dtype = pipeline, DTYPES[precision]
    config.expert_model_parallel_size, config.sequence_parallel = expert, sequence
    policy = build_policy(config, Objective.of(section(recipe, "objective")))
    policy.configure_model()
    model = policy.eval().module.cuda()  # Megatron builds its layers there, but not our norms
    wanted = model.sharded_state_dict(prefix=MODEL_PREFIX, metadata=CONTENT_METADATA)
    wanted = without_missing_extra_states(wanted, checkpoint / WEIGHTS)
    loaded = dist_checkpointing.load(wanted, str(checkpoint / WEIGHTS), strict="raise_unexpected")
    model.load_state_dict({k.removeprefix(MODEL_PREFIX): v for k, v in loaded.items() if k.startswith(MODEL_PREFIX)})
    return policy


def without_missing_extra_states(wanted: dict[str, Any], weights: Path) -> dict[str, Any]:
    """A sharded state dict that does not ask for Transformer Engine's extra states where the checkpoint has none.

    Its modules keep scaling factors of fp8 there, and nothing at other precisions; plain PyTorch layers have no such
    state. None tells a module that there is nothing to load.
    """
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject

    saved = {key.partition("/shard_")[0] for key in TorchDistReader(weights).keys}

    def known(entry: Any) -> Any:
        extra = isinstance(entry, ShardedObject) and entry.key.endswith("_extra_state")
        return LocalNonpersistentObject(None) if extra and entry.key not in saved else entry

    return dict_list_map_inplace(known, wanted)
