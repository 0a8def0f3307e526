"""Preflight plan of a recipe on a cluster: memory and communication of each pipeline stage (see :mod:`.report`)."""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from treg_megatron.config import recipe
from treg_megatron.config.schema import (
    ClusterSection,
    DataSection,
    LabelSection,
    LoraSection,
    ModelSection,
    ObjectiveSection,
    OptimizerSection,
    ParallelSection,
    TrainSection,
)
from treg_megatron.distributed import layout
from treg_megatron.models.architecture import hf_config_of
from treg_megatron.models.families import family_of, model_fields
from treg_megatron.objective import Objective
from treg_megatron.preflight import activations, costs, schedule, steps
from treg_megatron.preflight.gpus import Utilisation, utilisation, with_gpu
from treg_megatron.preflight.ranks import AtRest, build_rank, bytes_at_rest, parameters_of_the_model, trained_elements
from treg_megatron.preflight.world import fake_world, group_names, rank_of_stage
from treg_megatron.training.offload import require_fraction

#: allowance for NCCL's buffers per process group; not measured
NCCL_BYTES_PER_GROUP = 256 << 20
#: of an element of Adam's two moments; and on the host also its fp32 copy and gradient
BYTES_OF_MOMENTS, BYTES_ON_HOST = 8, 16
#: buffers for overlapped tensor-parallel communication, each for a whole row, as Transformer Engine 2.9 to 2.12 make
#: them; not measured
OVERLAP_BUFFERS = 12
#: allowance for fragmentation of the caching allocator, as a share of a step's peak; not measured
FRAGMENTATION = 0.08


class Sections(NamedTuple):
    """The sections of a recipe that decide whether it fits."""

    model: ModelSection
    parallel: ParallelSection
    data: DataSection
    train: TrainSection
    objective: ObjectiveSection
    optimizer: OptimizerSection
    lora: LoraSection
    label: LabelSection
    cluster: ClusterSection

    @property
    def ranks(self) -> int:
        """Number of ranks (GPUs or processes) in the cluster."""
        return self.cluster.nodes * self.cluster.gpus_per_node

    def with_keys(self, **keys: dict[str, Any]) -> "Sections":
        """A copy with some keys replaced: ``with_keys(parallel={"tensor": 4})``."""
        return self._replace(
            **{name: dataclasses.replace(getattr(self, name), **values) for name, values in keys.items()}
        )


@dataclass(frozen=True)
class Stage:
    """Memory of each rank of a pipeline stage, in bytes."""

    at_rest: AtRest
    peak: activations.Peak
    communication: int
    fragmentation: int
    trained: tuple[int, int]  # see ranks.trained_elements
    moved: dict[str, int]  # bytes that a rank passes to collectives per step, by kind of group
    on_host: int  # bytes of the optimizer in the host's memory

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by use, in the order of the report's columns."""
        return {
            "weights": self.at_rest.weights,
            "gradients": self.at_rest.gradients,
            "main parameters": self.at_rest.main_parameters,
            "optimizer state": self.at_rest.optimizer_state,
            "activations": self.peak.activations,
            "working memory": self.peak.working,
            "log-prob head": self.peak.head,
            "communication": self.communication,
            "fragmentation": self.fragmentation,
        }

    @property
    def total(self) -> int:
        """Bytes that the rank needs at its peak."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """Resources that a recipe needs on its cluster."""

    sections: Sections
    fields: dict[str, Any]
    trainable: int  # parameters over all ranks of the stages built, each counted once
    frozen: int
    stages: dict[int, Stage]
    data_ranks: int
    micro_batches: int  # per rank and step, those that only fill a group of the interleaved schedule included

    @property
    def memory(self) -> float:
        """Memory available to a rank in bytes, as given in the recipe."""
        return self.sections.cluster.gpu_memory * 1e9

    @property
    def fullest(self) -> int:
        """Index of the pipeline stage that needs the most memory."""
        return max(self.stages, key=lambda stage: self.stages[stage].total)

    @property
    def fits(self) -> bool:
        """Whether every stage fits into a rank's memory."""
        return self.stages[self.fullest].total <= self.memory

    @property
    def saving_host_bytes(self) -> int:
        """Host memory that saving a checkpoint needs on the fullest node; all stages must have been built."""
        sections = self.sections
        elements = [self.stages[stage].trained for stage in sorted(self.stages)]
        return costs.saving_host_bytes(elements, sections.parallel, sections.ranks, sections.cluster.gpus_per_node)

    @property
    def offloaded_bytes(self) -> int:
        """Host memory that the optimizer takes on a node whose ranks all hold the fullest stage."""
        return self.sections.cluster.gpus_per_node * max(stage.on_host for stage in self.stages.values())

    @property
    def bubble(self) -> float:
        """Share of a step in which a stage has nothing to do, see :func:`steps.bubble`."""
        return steps.bubble(self.sections.parallel, self.sections.data, self.data_ranks)

    @property
    def bubble_of_short_pairs(self) -> float:
        """The same where pairs have an ordinary length, so that several share a bin and micro-batches are fewer."""
        return steps.bubble(self.sections.parallel, self.sections.data, self.data_ranks, steps.TYPICAL_FILL)

    @property
    def utilisation(self) -> Utilisation:
        """The utilisation that times are estimated with. It includes communication."""
        return utilisation(self.sections.cluster, self.fields, self.trainable + self.frozen)

    @property
    def step_seconds(self) -> float:
        """Seconds per step at this utilisation, with recompute and the pipeline bubble, which it does not include."""
        sections = self.sections
        flops = steps.flops(self.fields, sections.data, sections.lora, sections.train)
        return 3600 * costs.hours(flops, sections.ranks, sections.cluster, self.utilisation.share) / (1 - self.bubble)


def sections_of(config: DictConfig) -> Sections:
    """The sections of a recipe, each validated on its own.

    Raises:
        UserError: see :func:`treg_megatron.config.recipe.section`.
    """
    config = copy.deepcopy(config)
    if OmegaConf.is_missing(config.label, "pairs"):
        config.label.pairs = "(not named yet)"  # preflight does not need the pairs to label
    sections = Sections(*(recipe.section(config, name) for name in Sections._fields))
    return sections._replace(cluster=with_gpu(sections.cluster))


def require_possible(sections: Sections) -> dict[str, Any]:
    """Check everything that training validates before it starts; return the model's fields.

    Raises:
        UserError: the recipe cannot run on its cluster with any amount of memory.
    """
    hf_config = hf_config_of(sections.model)
    fields = model_fields(hf_config)
    Objective.of(sections.objective)
    layout.require_tensor_inside_node(sections.parallel, sections.cluster.gpus_per_node)
    layout.require_layout(fields, sections.parallel, sections.data, sections.ranks)
    family_of(hf_config).require_schedule(sections.parallel)
    if sections.label.engine == "megatron":
        layout.require_split(fields, sections.label.tensor, sections.label.pipeline, "label")
    return fields


def make_plan(sections: Sections, stages: list[int] | None = None) -> Plan:
    """Build one rank of each pipeline stage on meta tensors and run a micro-batch through it.

    One rank per stage is enough: the tensor-parallel and data-parallel ranks of a stage have the same shapes.

    Args:
        stages: the stages to build, all by default. Parameter counts cover these stages only.

    Raises:
        UserError: see :func:`require_possible`.
    """
    fields, parallel, size = require_possible(sections), sections.parallel, sections.ranks
    data_ranks = layout.data_parallel_size(parallel, size)
    micro_batches = steps.micro_batches(parallel, sections.data, data_ranks)
    built, trainable, frozen = {}, 0, 0
    for stage in range(parallel.pipeline) if stages is None else stages:
        with fake_world(parallel, size, rank_of_stage(parallel, size, stage), sections.cluster.device == "gpu"):
            built[stage], counts = _build_stage(sections, stage, micro_batches, data_ranks)
        trainable, frozen = trainable + counts[0], frozen + counts[1]
    return Plan(sections, fields, trainable, frozen, built, data_ranks, micro_batches)


def _build_stage(sections: Sections, stage: int, micro_batches: int, data_ranks: int) -> tuple[Stage, tuple[int, int]]:
    parallel, on_gpu = sections.parallel, sections.cluster.device == "gpu"
    fraction = require_fraction(sections.optimizer.offload)
    rank = build_rank(
        hf_config_of(sections.model),
        parallel,
        sections.train,
        sections.objective,
        dataclasses.replace(sections.optimizer, offload=0.0),
        sections.lora,
        fused=on_gpu,
    )
    batch = activations.largest_micro_batch(sections.data, parallel)
    passes = [activations.run_chunk(rank, chunk, batch) for chunk in range(len(rank.policies))]
    hidden = activations.hidden_bytes(batch, rank.config)
    peak = activations.peak(
        passes, schedule.events(stage, parallel.pipeline, len(passes), micro_batches), held=hidden if stage else 0
    )
    at_rest, names = bytes_at_rest(rank.wrapped, rank.optimizer), group_names(bool(rank.config.num_moe_experts))
    groups = len(names) + (parallel.pipeline > 1) + (data_ranks > 1)
    overlapped = OVERLAP_BUFFERS * hidden * parallel.tensor if parallel.tensor_overlap else 0
    moved = costs.moved_in_a_step(
        passes,
        names,
        micro_batches,
        at_rest.gradients,
        at_rest.weights,
        hidden * len(passes),
        parallel.pipeline,
        data_ranks,
    )
    return Stage(
        at_rest.offloaded(fraction),
        peak,
        communication=(NCCL_BYTES_PER_GROUP * groups if on_gpu else 0) + overlapped,
        fragmentation=round(FRAGMENTATION * peak.total),
        trained=trained_elements(rank.wrapped),
        moved=moved,
        on_host=round(fraction * at_rest.optimizer_state / BYTES_OF_MOMENTS * BYTES_ON_HOST),
    ), parameters_of_the_model(rank.policies)
