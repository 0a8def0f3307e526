"""Training: align a model with labelled preference pairs, as one rank of a job.

One process per rank, under torchrun or srun; ``treg train`` starts them on one machine:

    torchrun --nproc-per-node 2 -m treg_megatron.train --recipe recipes/smollm2_135m.yaml parallel.pipeline=2

The same command resumes an interrupted run from its newest complete checkpoint.

A wrong recipe is refused before torch and NeMo are imported, which takes many seconds; and Megatron must be imported
after the CPU redirect is on. That is why imports stand in functions here, and nowhere else without need.
"""

import argparse
import atexit
import dataclasses
import logging
import multiprocessing
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from treg_megatron.checkpoint.layout import CHECKPOINTS, CheckpointMetadata, read_metadata, require_whole
from treg_megatron.cli.arguments import add_recipe_arguments, command_parser, parse_recipe
from treg_megatron.config.recipe import section
from treg_megatron.config.schema import DataSection, OptimizerSection, ParallelSection, TrainSection
from treg_megatron.distributed.connections import set_connections
from treg_megatron.distributed.launch import (
    RankInfo,
    destroy_process_group,
    init_process_group,
    on_rank_zero,
    rank_info,
    require_device,
)
from treg_megatron.errors import UserError
from treg_megatron.utils import entry
from treg_megatron.utils.imports import heavy_imports
from treg_megatron.utils.lock import Lock
from treg_megatron.utils.signals import end_with_parent

if TYPE_CHECKING:
    from nemo import lightning as nl

    from treg_megatron.models.policy import Policy
    from treg_megatron.objective import Objective
    from treg_megatron.training.callbacks.preemption import StopOnSignal
    from treg_megatron.training.data_module import PairData

logger = logging.getLogger("treg_megatron.train")  # as __main__, the module has another name


def parser() -> argparse.ArgumentParser:
    """Arguments of ``python -m treg_megatron.train``."""
    parser = command_parser("torchrun -m treg_megatron.train", __doc__)
    add_recipe_arguments(parser)
    return parser


def train(recipe: DictConfig) -> None:
    """Run or resume the training that a recipe describes, as this process' rank of it.

    Raises:
        UserError: anything in the recipe or the files it names that cannot work.
    """
    job = prepare(recipe)
    fit(job)
    finish(job)


@dataclass
class Plan:
    """A recipe whose layout, files and datasets fit together; nothing heavy is imported yet.

    Attributes:
        fields: sizes of the model, as ``families.model_fields`` gives them.
        streams: the opened datasets by their name in the recipe.
    """

    recipe: DictConfig
    ranks: RankInfo
    identity: CheckpointMetadata
    fields: dict[str, Any]
    objective: "Objective"
    data: DataSection
    parallel: ParallelSection
    optimizer: OptimizerSection
    run: TrainSection
    checkpoint: Path
    streams: dict[str, Any]


@dataclass
class Job:
    """Everything that a rank trains with.

    Attributes:
        steps: optimizer steps of the whole run.
        resume: the checkpoint that training continues from, or None.
    """

    trainer: "nl.Trainer"
    policy: "Policy"
    pairs: "PairData"
    steps: int
    resume: Path | None
    stop: "StopOnSignal"
    output: Path


def prepare(recipe: DictConfig) -> Job:
    """Check the recipe, join the other ranks, and build what is trained.

    Raises:
        UserError: as :func:`train`.
    """
    plan = checked(recipe)
    set_up_stack(plan)
    with heavy_imports():
        from treg_megatron.models.build import shares_prompts
        from treg_megatron.training.data_module import PairData

    ranks, run, streams = plan.ranks, plan.run, plan.streams
    data = dataclasses.replace(plan.data, share_prompts=shares_prompts(plan.fields, plan.parallel, plan.data))
    init_process_group(ranks, run.hang_timeout_s)
    output = Path(run.output)
    lock = Lock(output / CHECKPOINTS)
    on_rank_zero(lock.acquire)
    atexit.register(lock.release)
    on_rank_zero(lambda: require_undamaged(plan))
    pairs = PairData(
        data, streams[data.train], streams.get(data.validation), plan.parallel, plan.objective.needs_token_order
    )
    steps = min(pairs.steps, run.max_steps or pairs.steps)
    resume = on_rank_zero(lambda: resumable(plan))
    if ranks.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(recipe, output / "recipe.yaml")
    logger.info(
        "%d pairs, %d steps of %d pairs, %s",
        len(pairs.train),
        steps,
        data.global_batch_size,
        f"resuming from {resume.name}" if resume else f"starting from {plan.checkpoint}",
    )
    return build_job(plan, pairs, steps, resume, lock)


def resumable(plan: Plan) -> Path | None:
    """The checkpoint that training continues from, if there is one.

    Raises:
        UserError: it was trained on other token rewards of the dataset.
    """
    from treg_megatron.checkpoint.run_folder import checkpoint_to_resume

    checkpoint = checkpoint_to_resume(Path(plan.run.output))
    if checkpoint is not None:
        recorded = read_metadata(checkpoint).run.get("recipe", {}).get("objective", {}).get("values")
        if (recorded or None) != (plan.objective.values or None):
            raise UserError(
                f"{checkpoint} was trained with objective.values={recorded}, not {plan.objective.values}: name another "
                "train.output, or leave the key as it was"
            )
    return checkpoint


def require_undamaged(plan: Plan) -> None:
    """Check every byte of the datasets, about a second per gigabyte, and a sample of the initial weights.

    Raises:
        UserError: something is not what was written, and would be trained on.
    """
    require_whole(plan.checkpoint)
    for opened in plan.streams.values():
        opened.require_unchanged()


def checked(recipe: DictConfig) -> Plan:
    """Refuse what cannot work, with what is known before anything heavy is imported.

    Raises:
        UserError: as :func:`train`.
    """
    from treg_megatron.data.checks import require_trainable
    from treg_megatron.data.streams import open_streams, require_same_tokenizer
    from treg_megatron.distributed.layout import require_layout
    from treg_megatron.models.architecture import require_architecture
    from treg_megatron.models.families import model_fields
    from treg_megatron.objective import Objective

    model, data, parallel, optimizer, run = (
        section(recipe, name) for name in ("model", "data", "parallel", "optimizer", "train")
    )
    objective = Objective.of(section(recipe, "objective"))
    ranks = rank_info()
    checkpoint = Path(model.checkpoint)
    identity = read_metadata(checkpoint)
    require_architecture(model, identity.hf_config, model.checkpoint)
    fields = model_fields(identity.hf_config)
    require_layout(fields, parallel, data, ranks.size)
    streams = {prefix: open_streams(prefix, objective.values) for prefix in (data.train, data.validation) if prefix}
    for opened in streams.values():
        require_same_tokenizer(opened.manifest, model.hf)
        require_trainable(opened, data, objective)
    return Plan(recipe, ranks, identity, fields, objective, data, parallel, optimizer, run, checkpoint, streams)


def set_up_stack(plan: Plan) -> None:
    """Turn on the CPU redirect where there is no GPU, and log what is installed.

    Raises:
        UserError: there is no GPU for a recipe that wants one, or versions of Megatron or NeMo do not train.
    """
    import torch

    set_connections(plan.parallel)
    require_device(section(plan.recipe, "cluster").device)
    if not torch.cuda.is_available():
        from treg_megatron.distributed.cpu_redirect import use_cpu

        use_cpu()
    from treg_megatron.distributed.stack import describe_stack, require_stack

    logger.info(describe_stack(require_stack()))
    if plan.objective.warning:
        logger.warning(plan.objective.warning)


def build_job(plan: Plan, pairs: "PairData", steps: int, resume: Path | None, lock: Lock) -> Job:
    """The policy, the trainer and its callbacks."""
    from treg_megatron.distributed.layout import data_parallel_size
    from treg_megatron.models import lora
    from treg_megatron.models.build import build_policy, policy_config, require_overlapping_layers
    from treg_megatron.training import build
    from treg_megatron.training.callbacks.checkpoints import SaveEvery
    from treg_megatron.training.callbacks.heartbeat import Heartbeat
    from treg_megatron.training.callbacks.metrics import RunMetrics
    from treg_megatron.training.callbacks.pair_record import PairRecord
    from treg_megatron.training.callbacks.preemption import StopOnSignal
    from treg_megatron.training.callbacks.tensor_overlap import OverlapBuffers
    from treg_megatron.training.callbacks.validation import ValidateEvery

    ranks, run, objective, output = plan.ranks, plan.run, plan.objective, Path(plan.run.output)
    metrics = RunMetrics(output, pairs.steps_per_epoch, objective.first_preference_loss, run.first_loss_tolerance)
    stop = StopOnSignal()
    written_by = {"recipe": OmegaConf.to_container(plan.recipe, resolve=False), "data": pairs.train.manifest}
    callbacks = [
        metrics,
        *([PairRecord(output)] if run.record_pairs else []),
        *([ValidateEvery(run.validate_every, metrics)] if plan.data.validation else []),
        stop,  # before SaveEvery, which saves when the run is to stop
        SaveEvery(
            output,
            run.save_every,
            run.save_total_limit,
            plan.identity,
            metrics=metrics.last,
            description=written_by,
            lock=lock,
        ),
        Heartbeat(ranks, run.hang_timeout_s),  # the last: a step counts when it is saved
    ]
    # divided by the step's pairs like every gradient, the routers' becomes its mean over micro-batches
    data_ranks = data_parallel_size(plan.parallel, ranks.size)
    router_aux_loss = plan.optimizer.router_aux_loss * pairs.pairs_per_micro_batch(data_ranks)
    config = policy_config(plan.identity.hf_config, plan.parallel, run, router_aux_loss)
    require_overlapping_layers(config, plan.parallel)
    if plan.parallel.tensor_overlap:
        callbacks.append(OverlapBuffers(pairs.bin_size // plan.parallel.context, config.hidden_size))
    adapters = lora.adapters(section(plan.recipe, "lora"), config)
    if adapters is not None:
        callbacks.append(adapters)
    strategy = build.strategy(plan.parallel, run, initial_weights=None if resume else plan.checkpoint)
    trainer = build.trainer(ranks, strategy, run, steps, callbacks)
    policy = build_policy(config, objective, build.optimizer(plan.optimizer, run, steps), adapters)
    if resume and adapters is not None:
        resume = lora.resumed(resume, plan.checkpoint)
    return Job(trainer, policy, pairs, steps, resume, stop, output)


def fit(job: Job) -> None:
    """Train to the last step, or until a signal asks to stop."""
    job.trainer.fit(job.policy, datamodule=job.pairs, ckpt_path=job.resume)


def finish(job: Job) -> None:
    """Leave the other ranks and log how the run ended; exits with its code if a signal stopped it."""
    from treg_megatron.training.callbacks.preemption import EXIT_STOPPED

    job.stop.settle()
    destroy_process_group()
    if job.stop.stopped_by:
        logger.info(
            "stopped by %s: step %d of %d is saved; rerun the same command to continue",
            job.stop.stopped_by,
            job.trainer.global_step,
            job.steps,
        )
        sys.exit(EXIT_STOPPED)
    logger.info("done: %d steps, checkpoints and metrics.jsonl in %s", job.steps, job.output)


if __name__ == "__mp_main__":
    end_with_parent()
if __name__ == "__main__":  # checkpoint writers are spawned: they import this module again
    multiprocessing.freeze_support()
    entry.run(lambda: train(parse_recipe(parser().parse_args())))
