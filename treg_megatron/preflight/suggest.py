"""Search for parallel layouts that fit a cluster, and for the smallest change that makes a recipe fit."""

from collections.abc import Iterator
from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.models.architecture import hf_config_of
from treg_megatron.models.families import model_fields
from treg_megatron.preflight.plan import Plan, Sections, make_plan, require_possible

RECOMPUTE = ("none", "selective", "full")


def remedy(plan: Plan) -> str:
    """One line with a change that makes the plan fit: to one key if that is enough, else to layout or cluster."""
    sections = plan.sections
    for change in _single_changes(sections):
        if _fits(sections.with_keys(**change), plan.trainable + plan.frozen):
            return f"to make it fit: {_as_overrides(change)}"
    for found in suggestions(sections, plan.trainable + plan.frozen, most=1):
        return f"to make it fit: {_as_overrides(_layout_of(found.sections))}"
    for factor in (2, 4, 8, 16):
        larger = sections.with_keys(cluster={"nodes": factor * sections.cluster.nodes})
        for found in suggestions(larger, plan.trainable + plan.frozen, most=1):
            return (
                f"to make it fit: --nodes {larger.cluster.nodes} with {_as_overrides(_layout_of(found.sections))}; no "
                "layout fits this cluster"
            )
    return (
        "nothing that preflight tried makes it fit: use shorter sequences (data.seq_length), adapters (lora.rank) or "
        "more memory"
    )


def suggestions(sections: Sections, parameters: int, most: int = 8) -> list[Plan]:
    """Layouts that fit, fastest first (estimated from utilisation, pipeline bubble and recompute).

    Among layouts that differ only in recompute, the one that recomputes least is returned. Only the first and the last
    stage of each are built: one of them needs the most memory.

    Args:
        parameters: number of parameters of the model, to discard layouts without building them.
        most: stop after this many.
    """
    found: list[Plan] = []
    for candidate in _layouts(sections):
        if _at_rest(candidate, parameters) > candidate.cluster.gpu_memory * 1e9:
            continue
        for recompute in RECOMPUTE:
            plan = make_plan(
                candidate.with_keys(train={"recompute": recompute}), stages=sorted({0, candidate.parallel.pipeline - 1})
            )
            if plan.fits:
                found.append(plan)
                break
        if len(found) >= most:
            break
    return sorted(found, key=lambda plan: (plan.step_seconds, plan.sections.parallel.tensor))


def _layouts(sections: Sections) -> Iterator[Sections]:
    """Every valid layout of the cluster, those with few model-parallel ranks first."""
    layers, ranks = model_fields(hf_config_of(sections.model))["num_layers"], sections.ranks
    experts = model_fields(hf_config_of(sections.model)).get("num_moe_experts") or 1
    sizes = [
        (tensor, pipeline, expert)
        for tensor in range(1, sections.cluster.gpus_per_node + 1)
        for pipeline in range(1, layers + 1)
        for expert in range(1, experts + 1)
        if tensor * pipeline <= ranks and layers % pipeline == 0
    ]
    for tensor, pipeline, expert in sorted(sizes, key=lambda size: (size[0] * size[1], -size[0], -size[2])):
        candidate = sections.with_keys(
            parallel={
                "tensor": tensor,
                "pipeline": pipeline,
                "expert": expert,
                "sequence": tensor > 1,
                "virtual_pipeline": None,
            }
        )
        try:
            require_possible(candidate)
        except UserError:
            continue
        yield candidate


def _single_changes(sections: Sections) -> Iterator[dict[str, dict[str, Any]]]:
    parallel, train, data = sections.parallel, sections.train, sections.data
    if parallel.tensor > 1 and not parallel.sequence:
        yield {"parallel": {"sequence": True}}
    for recompute in RECOMPUTE[RECOMPUTE.index(train.recompute) + 1 :]:
        yield {"train": {"recompute": recompute}}
    if data.micro_batch_size > 1:
        yield {"data": {"micro_batch_size": 1}}
    for factor in (2, 4):
        yield {"parallel": {"pipeline": factor * parallel.pipeline}}
        yield {"parallel": {"tensor": factor * parallel.tensor, "sequence": True}}


def _fits(sections: Sections, parameters: int) -> bool:
    if _at_rest(sections, parameters) > sections.cluster.gpu_memory * 1e9:
        return False
    try:
        return make_plan(sections, stages=sorted({0, sections.parallel.pipeline - 1})).fits
    except UserError:
        return False


def _at_rest(sections: Sections, parameters: int) -> float:
    """Lower bound of a rank's memory in bytes: its share of weights, gradients and optimizer state."""
    parallel = sections.parallel
    split = parallel.tensor * parallel.pipeline * parallel.expert
    trained = 0 if sections.lora.rank else 1
    weight, adam = (2, 12) if sections.train.precision == "bf16" else (4, 8)
    return parameters * (weight + trained * 4) / split + trained * parameters * adam / sections.ranks


def _layout_of(sections: Sections) -> dict[str, dict[str, Any]]:
    parallel = sections.parallel
    keys = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "sequence": parallel.sequence}
    return {
        "parallel": keys | ({"expert": parallel.expert} if parallel.expert > 1 else {}),
        "train": {"recompute": sections.train.recompute},
    }


def _as_overrides(change: dict[str, dict[str, Any]]) -> str:
    """The change as overrides on a command line."""
    return " ".join(
        f"{section}.{key}={str(value).lower()}" for section, keys in change.items() for key, value in keys.items()
    )
