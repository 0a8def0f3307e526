"""Whether the reference model fits the GPUs that label with it: one process with a whole model, or a split one."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from treg_megatron.config.schema import ClusterSection, LabelSection
from treg_megatron.distributed.layout import require_split
from treg_megatron.errors import UserError
from treg_megatron.preflight.costs import label_memory

GB = 1e9


def fit(parameters: int, label: LabelSection, fields: dict[str, Any], cluster: ClusterSection) -> str:
    """A phrase: how the model is split, what a rank needs, and if that is too much or too many, what to set instead.

    Args:
        parameters: of the reference model.
        fields: its sizes, from ``families.model_fields``.
    """
    split = label.engine == "megatron"
    how = (
        f"megatron, tensor {label.tensor} x pipeline {label.pipeline}"
        if split
        else "huggingface, the whole model in each process"
    )
    needs = label_memory(parameters, label, fields) / GB
    phrase = f"{how}, about {needs:.1f} of {cluster.gpu_memory:g} GB per rank"
    if split and cluster.gpus_per_node % label.tensor:
        wrong = f"label.tensor={label.tensor} crosses nodes of {cluster.gpus_per_node} ranks"
    elif needs > cluster.gpu_memory:
        wrong = "TOO MUCH"
    else:
        return phrase
    best = next(splits(parameters, label, fields, cluster), None)
    if best is None:
        return f"{phrase} - {wrong}, and no split over tensor and pipeline fits GPUs of {cluster.gpu_memory:g} GB"
    ranks = best.tensor * best.pipeline
    nodes = -(-ranks // cluster.gpus_per_node)
    where = "within a node" if nodes == 1 else f"over {nodes} nodes"
    keys = f"label.engine=megatron label.tensor={best.tensor} label.pipeline={best.pipeline}"
    return f"{phrase} - {wrong}: {keys}, {where}"


def splits(
    parameters: int, label: LabelSection, fields: dict[str, Any], cluster: ClusterSection
) -> Iterator[LabelSection]:
    """The splits that fit a rank's memory and keep tensor parallelism within a node, on the fewest ranks first."""
    sizes = [
        (tensor, pipeline)
        for tensor in range(1, cluster.gpus_per_node + 1)
        for pipeline in range(1, fields["num_layers"] + 1)
        if cluster.gpus_per_node % tensor == 0
    ]
    for tensor, pipeline in sorted(sizes, key=lambda size: (size[0] * size[1], -size[0])):
        candidate = dataclasses.replace(label, engine="megatron", tensor=tensor, pipeline=pipeline)
        try:
            require_split(fields, tensor, pipeline, "label")
        except UserError:
            continue
        if label_memory(parameters, candidate, fields) <= cluster.gpu_memory * GB:
            yield candidate
