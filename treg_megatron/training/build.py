"""Optimizer, strategy and trainer of a validated recipe."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.environments import LightningEnvironment
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.lightning.pytorch.optim import CosineAnnealingScheduler, MegatronOptimizerModule
from nemo.lightning.pytorch.strategies.utils import RestoreConfig

from treg_megatron.config.schema import OptimizerSection, ParallelSection, TrainSection
from treg_megatron.distributed.cpu_redirect import is_cpu
from treg_megatron.distributed.launch import RankInfo, device_index
from treg_megatron.distributed.layout import data_overlap
from treg_megatron.models.build import DTYPES
from treg_megatron.training.offload import offload
from treg_megatron.training.strategy import PolicyStrategy


def optimizer(section: OptimizerSection, train: TrainSection, steps: int) -> MegatronOptimizerModule:
    """AdamW in Megatron's distributed optimizer: linear warm-up, cosine decay to ``min_lr`` at step ``steps``."""
    config = OptimizerConfig(
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
    )
    offload(config, section.offload)
    return MegatronOptimizerModule(
        config=config,
        lr_scheduler=CosineAnnealingScheduler(
            max_steps=steps,
            warmup_steps=round(section.warmup_fraction * steps),
            constant_steps=0,
            min_lr=section.min_lr,
        ),
    )


def strategy(parallel: ParallelSection, train: TrainSection, initial_weights: Path | None) -> PolicyStrategy:
    """Megatron parallelism under Lightning; ``initial_weights`` is the imported checkpoint a new run starts from."""
    overlap_grad_reduce, overlap_param_gather = data_overlap(parallel, on_gpu=not is_cpu())
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
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            check_for_nan_in_grad=False,
            overlap_grad_reduce=overlap_grad_reduce,
            overlap_param_gather=overlap_param_gather,
            # chunks of an interleaved schedule run in turns: all gather at the start of a step
            align_param_gather=overlap_param_gather and bool(parallel.virtual_pipeline),
        ),
        restore_config=RestoreConfig(path=str(initial_weights)) if initial_weights else None,
        ckpt_async_save=train.save_in_background,
        ckpt_load_directly_on_device=not is_cpu(),
        replace_progress_bar=False,
    )


class Launched(LightningEnvironment):
    """Ranks that a launcher has started; Lightning knows fewer launchers, and starts processes where it knows none."""

    def __init__(self, world: RankInfo):
        super().__init__()
        self.world = world

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def world_size(self) -> int:
        return self.world.size

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self.world.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return self.world.local_rank

    def node_rank(self) -> int:
        return self.world.rank // self.world.local_size


class AssignedGpus(CUDAAccelerator):
    """Lightning's accelerator for GPUs, of which a process may see only its own: ``devices`` counts the processes of a
    node, and each gets its device as everywhere in this project."""

    @staticmethod
    def parse_devices(devices: int) -> list[int]:
        """Local ranks."""
        return list(range(devices))

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        """The device of each local rank; for other ranks than this one it may be none that this process sees."""
        return [torch.device("cuda", device_index(local_rank)) for local_rank in devices]


def trainer(
    world: RankInfo, strategy: PolicyStrategy, train: TrainSection, steps: int, callbacks: list[pl.Callback]
) -> nl.Trainer:
    """A trainer that leaves logging, saving and validation to ``callbacks``."""
    return nl.Trainer(
        accelerator="cpu" if is_cpu() else AssignedGpus(),
        devices=world.local_size,
        num_nodes=world.nodes,
        strategy=strategy,
        plugins=[
            nl.MegatronMixedPrecision(precision="bf16-mixed" if train.precision == "bf16" else "32"),
            Launched(world),
        ],
        max_steps=steps,
        max_epochs=1,  # one Lightning epoch covers all epochs of the run
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=callbacks,
    )
