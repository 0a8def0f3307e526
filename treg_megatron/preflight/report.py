"""Preflight report as text: memory table, cost of a training step and of the other steps, verdict."""

import math
from collections.abc import Iterator

from treg_megatron.preflight import costs, labelling
from treg_megatron.preflight.plan import Plan, Sections
from treg_megatron.utils.signals import SIGNAL_SECONDS, advised_seconds, seconds_before_time_limit

GB = 1e9
COLUMNS = {
    "weights": "weights",
    "gradients": "grads",
    "main parameters": "main",
    "optimizer state": "optim",
    "activations": "activ",
    "working memory": "work",
    "log-prob head": "head",
    "communication": "comm",
    "fragmentation": "gaps",
}


def report(plan: Plan, pairs: int | None) -> str:
    """The report without the verdict.

    Args:
        pairs: size of the training set, if known.
    """
    return "\n".join([*_heading(plan), "", *_memory(plan), "", *_step(plan, pairs), *_other_steps(plan, pairs)])


def verdict(plan: Plan) -> str:
    """One line: whether the fullest rank fits, and if not, what is too large."""
    total, memory = plan.stages[plan.fullest].total / GB, plan.memory / GB
    largest = max(plan.stages[plan.fullest].parts.items(), key=lambda part: part[1])
    where = f"stage {plan.fullest} takes {total:.1f} of {memory:.1f} GB"
    if plan.fits:
        return f"verdict: fits; the fullest rank, of {where}"
    return f"verdict: DOES NOT FIT; {where}, {total - memory:.1f} too much; {largest[1] / GB:.1f} is {largest[0]}"


def layout(sections: Sections, data_ranks: int) -> str:
    """The parallel layout and the recompute mode as a short phrase."""
    parallel = sections.parallel
    phrases = [
        f"tensor {parallel.tensor}" + (" with sequence parallelism" if parallel.sequence else ""),
        f"pipeline {parallel.pipeline}"
        + (f" in {parallel.virtual_pipeline} chunks per stage" if parallel.virtual_pipeline else ""),
    ]
    phrases += [f"{name} {getattr(parallel, name)}" for name in ("context", "expert") if getattr(parallel, name) > 1]
    return ", ".join([*phrases, f"data {data_ranks}", f"recompute {sections.train.recompute}"])


def _heading(plan: Plan) -> Iterator[str]:
    cluster = plan.sections.cluster
    unit = "GPUs" if cluster.device == "gpu" else "CPU processes"
    yield (
        f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''} of {cluster.gpus_per_node} {unit} with "
        f"{cluster.gpu_memory:g} GB: {layout(plan.sections, plan.data_ranks)}"
    )
    trained = f"{plan.trainable:,} of them in adapters, trained" if plan.frozen else "all trained"
    yield f"{plan.trainable + plan.frozen:,} parameters, {trained}"


def _memory(plan: Plan) -> Iterator[str]:
    yield "memory per rank, GB"
    yield f"{'stage':>7}" + "".join(f"{short:>9}" for short in COLUMNS.values()) + f"{'total':>9}"
    for number, stage in plan.stages.items():
        numbers = [*(stage.parts[name] for name in COLUMNS), stage.total]
        yield f"{number:>7}" + "".join(f"{value / GB:9.2f}" for value in numbers)


def _step(plan: Plan, pairs: int | None) -> Iterator[str]:
    data, cluster = plan.sections.data, plan.sections.cluster
    pairs_each = f"{data.micro_batch_size} pair{'s' if data.micro_batch_size > 1 else ''}"
    each = "1 bin" if data.layout == "bins" else pairs_each
    yield (
        f"step: {data.global_batch_size} pairs = {plan.data_ranks} data-parallel ranks x {plan.micro_batches} "
        f"micro-batches of {each}" + (" at most" if data.layout == "bins" else "")
    )
    if pairs is None:
        yield "epoch: the training data does not exist yet; set cluster.pairs=N to see the number of steps"
    else:
        steps = math.ceil(pairs / data.global_batch_size)
        yield (
            f"epoch: {pairs:,} pairs, {steps:,} steps; data.epochs={data.epochs} takes about "
            f"{steps * data.epochs * plan.step_seconds / 3600:.1f} h"
        )
    flops = costs.step_flops(plan.fields, data, plan.sections.lora.rank is not None)
    yield (
        f"arithmetic: {flops / 1e15:.3g} PFLOP per step; {plan.step_seconds:.3g} s at {plan.utilisation.share:.0%} of "
        f"{cluster.peak_tflops:g} TFLOP/s, {plan.bubble:.0%} pipeline bubble included"
        + (", and the forward pass twice" if plan.sections.train.recompute == "full" else "")
        + f"; utilisation: {plan.utilisation.measured}"
    )
    if plan.sections.parallel.pipeline > 1 and data.layout == "bins":
        short = plan.bubble_of_short_pairs
        yield f"bubble: {plan.bubble:.1%}; {short:.1%} where pairs are a third as long, and a bin holds three"
    moved = {
        kind: max(stage.moved.get(kind, 0) for stage in plan.stages.values())
        for stage in plan.stages.values()
        for kind in stage.moved
    }
    listed = [
        f"{kind} {nbytes / GB:.2f} ({nbytes / GB / _bandwidth(plan, kind):.2g} s)" for kind, nbytes in moved.items()
    ]
    yield f"moved per rank and step, GB: {', '.join(listed) or 0}"


def _other_steps(plan: Plan, pairs: int | None) -> Iterator[str]:
    label, train, cluster = plan.sections.label, plan.sections.train, plan.sections.cluster
    saved = costs.checkpoint(plan.trainable, plan.frozen, train.precision, cluster)
    yield (
        f"checkpoint: {saved.nbytes / GB:,.1f} GB every {train.save_every} steps, {saved.seconds:.3g} s at "
        f"{cluster.storage_bandwidth:g} GB/s; {train.save_total_limit} kept"
    )
    before, advised = seconds_before_time_limit() or SIGNAL_SECONDS, advised_seconds(saved.seconds + plan.step_seconds)
    yield f"time limit: Slurm's signal {before} s before it " + (
        "leaves time to finish a step and save it"
        if advised <= before
        else f"is TOO LATE to be sure of a step and its save: submit with SBATCH_SIGNAL=USR1@{advised}"
    )
    yield (
        f"saving: up to {plan.saving_host_bytes / GB:,.0f} GB of host memory on a node"
        f"{_of_host(plan.saving_host_bytes, cluster.host_memory)}, and no more GPU memory than a step"
    )
    if plan.offloaded_bytes:
        both = plan.offloaded_bytes + plan.saving_host_bytes
        yield (
            f"offload: {plan.offloaded_bytes / GB:,.0f} GB of host memory on a node for the optimizer; with saving "
            f"{both / GB:,.0f}{_of_host(both, cluster.host_memory)}"
        )
    count = pairs or 10_000
    flops = costs.label_flops(plan.fields, plan.sections.data, count)
    time = costs.hours(flops, plan.sections.ranks, cluster, plan.utilisation.share)
    fit = labelling.fit(plan.trainable + plan.frozen, label, plan.fields, cluster)
    yield f"labelling: {fit}; {count:,} pairs take about {time:.2g} h on the whole cluster"


def _of_host(nbytes: int, memory: float | None) -> str:
    """How that compares with a node's memory, if the recipe gives it."""
    if memory is None:
        return ""
    too_much = " - TOO MUCH: raise parallel.pipeline, or take more nodes" if nbytes > memory * GB else ""
    return f" of {memory:,.0f}{too_much}"


def _bandwidth(plan: Plan, kind: str) -> float:
    """Bandwidth in GB/s of the link that groups of this kind use: within a node, or the network."""
    cluster, parallel = plan.sections.cluster, plan.sections.parallel
    spans = {"tensor": parallel.tensor, "expert tensor": parallel.tensor, "context": parallel.tensor * parallel.context}
    crosses = spans.get(kind, parallel.tensor * parallel.expert if "expert" in kind else plan.sections.ranks)
    return cluster.node_bandwidth if crosses <= cluster.gpus_per_node else cluster.network_bandwidth
