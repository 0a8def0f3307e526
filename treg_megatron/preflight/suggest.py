"""Layouts to suggest, and the smallest change that makes a recipe fit."""

import itertools
from collections.abc import Iterator
from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.preflight.plan import Plan, Sections, make_plan
from treg_megatron.preflight.search import RECOMPUTE, fitting


def remedy(plan: Plan) -> str:
    """One line with a change that makes the plan fit: to one key if that is enough, else to layout or cluster."""
    sections = plan.sections
    for change in _single_changes(sections):
        if _fits(sections.with_keys(**change), plan.trainable + plan.frozen):
            return f"to make it fit: {_as_overrides(change)}"
    for found in suggestions(sections, most=1):
        return f"to make it fit: {_as_overrides(_layout_of(found.sections))}"
    for factor in (2, 4, 8, 16):
        larger = sections.with_keys(cluster={"nodes": factor * sections.cluster.nodes})
        for found in suggestions(larger, most=1):
            return (
                f"to make it fit: --nodes {larger.cluster.nodes} with {_as_overrides(_layout_of(found.sections))}; no "
                "layout fits this cluster"
            )
    return (
        "nothing that preflight tried makes it fit: use shorter sequences (data.seq_length), adapters (lora.rank) or "
        "more memory"
    )


def suggestions(sections: Sections, most: int = 8) -> list[Plan]:
    """Layouts that fit, the fastest first."""
    return sorted(itertools.islice(fitting(sections), most), key=lambda plan: plan.step_seconds)


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
    optional = {
        "expert": parallel.expert if parallel.expert > 1 else None,
        "virtual_pipeline": parallel.virtual_pipeline,
    }
    return {
        "parallel": keys | {name: size for name, size in optional.items() if size},
        "train": {"recompute": sections.train.recompute},
    }


def _as_overrides(change: dict[str, dict[str, Any]]) -> str:
    """The change as overrides on a command line."""
    return " ".join(
        f"{section}.{key}={str(value).lower()}" for section, keys in change.items() for key, value in keys.items()
    )
