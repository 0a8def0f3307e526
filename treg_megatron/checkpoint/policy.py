"""Policy model with the weights of a checkpoint, outside of a training run.

The only module of this package that needs NeMo, which it imports on use: conversion works without it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from treg_megatron.checkpoint.layout import MODEL_PREFIX, WEIGHTS, read_metadata
from treg_megatron.checkpoint.torch_dist import CONTENT_METADATA
from treg_megatron.config.recipe import load_recipe, section

if TYPE_CHECKING:
    from treg_megatron.models.policy import Policy


def load_policy(
    checkpoint: Path, tensor: int = 1, pipeline: int = 1, expert: int = 1, sequence: bool = False
) -> "Policy":
    """Load a checkpoint's policy in fp32, in evaluation mode; its ``module`` is this rank's part of Megatron's model.

    The model is built and loaded as for training. Megatron's ``parallel_state`` must have been initialised with the
    same sizes.

    Args:
        checkpoint: a complete checkpoint.
        tensor, pipeline, expert, sequence: the parallel layout, as in section ``parallel`` of a recipe.

    Raises:
        UserError: the checkpoint is incomplete, or the model does not support the layout.
    """
    from megatron.core import dist_checkpointing

    from treg_megatron.models.build import build_policy, policy_config
    from treg_megatron.objective import Objective

    hf_config = read_metadata(checkpoint).hf_config
    recipe = load_recipe(
        overrides=[
            "train.precision=fp32",
            f"parallel.tensor={tensor}",
            f"parallel.pipeline={pipeline}",
            f"parallel.sequence={sequence}",
        ]
    )
    config = policy_config(hf_config, section(recipe, "parallel"), section(recipe, "train"))
    # what NeMo's strategy fills in
    config.tensor_model_parallel_size = config.expert_tensor_parallel_size = tensor
    config.pipeline_model_parallel_size, config.pipeline_dtype = pipeline, torch.float32
    config.expert_model_parallel_size, config.sequence_parallel = expert, sequence
    policy = build_policy(config, Objective.of(section(recipe, "objective")))
    policy.configure_model()
    model = policy.eval().module
    wanted = model.sharded_state_dict(prefix=MODEL_PREFIX, metadata=CONTENT_METADATA)
    loaded = dist_checkpointing.load(wanted, str(checkpoint / WEIGHTS), strict="raise_unexpected")
    model.load_state_dict({k.removeprefix(MODEL_PREFIX): v for k, v in loaded.items() if k.startswith(MODEL_PREFIX)})
    return policy
