"""Align a model with labelled preference pairs: DPO or SimPO with token-level reward regularization.

One process per rank, under torchrun or srun:

    torchrun --nproc-per-node 2 -m treg_megatron.train --recipe recipes/smollm2_135m.yaml parallel.pipeline=2

The same command resumes an interrupted run from its newest complete checkpoint.
"""

import argparse
import dataclasses
import multiprocessing
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from treg_megatron.cli.arguments import add_recipe_arguments, parse_recipe
from treg_megatron.config.recipe import section
from treg_megatron.utils import entry
from treg_megatron.utils.imports import heavy_imports


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="torchrun -m treg_megatron.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_recipe_arguments(parser)
    train(parse_recipe(parser.parse_args(argv)))


def train(recipe: DictConfig) -> None:
    """Run or resume the training that a recipe describes, as this process' rank of it.

    Raises:
        UserError: anything in the recipe or the files it names that cannot work.
    """
    from treg_megatron.checkpoint.layout import read_identity
    from treg_megatron.data.checks import require_trainable
    from treg_megatron.data.streams import open_streams, require_same_tokenizer
    from treg_megatron.distributed.launch import join, leave, on_rank_zero, rank_zero_print, world
    from treg_megatron.distributed.layout import data_parallel_size, require_layout
    from treg_megatron.models.architecture import require_architecture
    from treg_megatron.models.families import model_fields
    from treg_megatron.objective import Objective

    model, data, parallel, optimizer, run = (
        section(recipe, name) for name in ("model", "data", "parallel", "optimizer", "train")
    )
    objective = Objective(**vars(section(recipe, "objective")))
    ranks = world()
    identity = read_identity(Path(model.checkpoint))
    require_architecture(model, identity.hf_config, model.checkpoint)
    fields = model_fields(identity.hf_config)
    data_ranks = data_parallel_size(parallel, ranks.size)
    require_layout(fields, parallel, data, ranks.size)
    streams = {prefix: open_streams(prefix) for prefix in (data.train, data.validation) if prefix}
    for opened in streams.values():
        require_same_tokenizer(opened.manifest, model.hf)
        require_trainable(opened, data, objective)

    import torch

    if not torch.cuda.is_available():
        from treg_megatron.distributed.cpu_redirect import use_cpu

        use_cpu()
    from treg_megatron.distributed.stack import describe_stack, require_stack

    require_stack()
    rank_zero_print(describe_stack())
    if objective.warning:
        rank_zero_print(f"warning: {objective.warning}")

    with heavy_imports():
        from treg_megatron.models import lora
        from treg_megatron.models.build import build_policy, policy_config, shares_prompts
        from treg_megatron.training import build
        from treg_megatron.training.callbacks.checkpoints import SaveEvery, checkpoint_to_resume
        from treg_megatron.training.callbacks.heartbeat import Heartbeat
        from treg_megatron.training.callbacks.metrics import RunMetrics
        from treg_megatron.training.callbacks.pair_record import PairRecord
        from treg_megatron.training.callbacks.preemption import EXIT_STOPPED, StopOnSignal
        from treg_megatron.training.callbacks.validation import ValidateEvery
        from treg_megatron.training.data_module import PairData

    data = dataclasses.replace(data, share_prompts=shares_prompts(fields, parallel, data))
    join(ranks, run.hang_timeout_s)
    # one reader is enough, and a second or so for a gigabyte: a byte that a disk has lost would be trained on
    on_rank_zero(lambda: [opened.require_unchanged() for opened in streams.values()])
    pairs = PairData(data, streams[data.train], streams.get(data.validation), parallel)
    steps = min(pairs.steps, run.max_steps or pairs.steps)
    output = Path(run.output)
    resume = on_rank_zero(lambda: checkpoint_to_resume(output))
    if ranks.rank == 0:
        output.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(recipe, output / "recipe.yaml")
    rank_zero_print(
        f"{len(pairs.train)} pairs, {steps} steps of {data.global_batch_size} pairs, "
        + (f"resuming from {resume.name}" if resume else f"starting from {model.checkpoint}")
    )

    metrics = RunMetrics(output, pairs.steps_per_epoch, objective.first_preference_loss, run.first_loss_tolerance)
    stop = StopOnSignal()
    callbacks = [
        metrics,
        *([PairRecord(output)] if run.record_pairs else []),
        *([ValidateEvery(run.validate_every, metrics)] if data.validation else []),
        stop,  # before SaveEvery, which saves when the run is to stop
        SaveEvery(
            output,
            run.save_every,
            run.save_total_limit,
            identity,
            metrics=metrics.last,
            description={"recipe": OmegaConf.to_container(recipe, resolve=False), "data": pairs.train.manifest},
        ),
        Heartbeat(ranks, run.hang_timeout_s),  # the last: a step counts when it is saved
    ]
    # divided by the step's pairs like every gradient, the routers' becomes its mean over micro-batches
    router_aux_loss = optimizer.router_aux_loss * pairs.pairs_per_micro_batch(data_ranks)
    config = policy_config(identity.hf_config, parallel, run, router_aux_loss)
    adapters = lora.adapters(section(recipe, "lora"), config)
    if adapters is not None:
        callbacks.append(adapters)
    strategy = build.strategy(parallel, run, initial_weights=None if resume else Path(model.checkpoint))
    trainer = build.trainer(ranks, strategy, run, steps, callbacks)
    policy = build_policy(config, objective, build.optimizer(optimizer, run, steps), adapters)
    if resume and adapters is not None:
        resume = lora.resumed(resume, Path(model.checkpoint))
    trainer.fit(policy, datamodule=pairs, ckpt_path=resume)
    stop.settle()
    leave()
    if stop.stopped_by:
        rank_zero_print(
            f"stopped by {stop.stopped_by}: step {trainer.global_step} of {steps} is saved, the same command "
            "goes on from there"
        )
        sys.exit(EXIT_STOPPED)
    rank_zero_print(f"done: {steps} steps, checkpoints and metrics.jsonl in {output}")


if __name__ == "__main__":  # checkpoint writers are spawned: they import this module again
    multiprocessing.freeze_support()
    entry.run(main)
