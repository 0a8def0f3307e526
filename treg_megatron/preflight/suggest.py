"""Layouts to suggest, and the smallest change that makes a recipe fit."""

import itertools
from collections.abc import Iterator
from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.preflight.plan import Plan, Sections, make_plan
from treg_megatron.preflight.search import RECOMPUTE, bound, fitting


def remedy(plan: Plan) -> str:
    """One line with a change that makes the plan fit: to one key if that is enough, else to layout or cluster."""
    sections = plan.sections
    for change in _single_changes(sections):
        if _fits(sections.with_keys(**change)):
            return f"to make it fit: {_as_overrides(change)}"
    for found in suggestions(sections, most=1):
        return f"to make it fit: {_as_overrides(_layout_of(found.sections, sections))}"
    for factor in (2, 4, 8, 16):
        larger = sections.with_keys(cluster={"nodes": factor * sections.cluster.nodes})
        for found in suggestions(larger, most=1):
            layout = _as_overrides(_layout_of(found.sections, sections))
            return f"to make it fit: --nodes {larger.cluster.nodes} with {layout}; no layout fits this cluster"
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


def _fits(sections: Sections) -> bool:
    try:
        if bound(sections) > sections.cluster.gpu_memory * 1e9:
            return False
        return make_plan(sections, stages=sorted({0, sections.parallel.pipeline - 1})).fits
    except UserError:
        return False


def _layout_of(found: Sections, given: Sections) -> dict[str, dict[str, Any]]:
    """The keys that make ``found`` of a recipe with ``given``."""
    parallel = {name: getattr(found.parallel, name) for name in ("tensor", "pipeline", "sequence")}
    for name in ("expert", "virtual_pipeline"):
        if getattr(found.parallel, name) != getattr(given.parallel, name):
            parallel[name] = getattr(found.parallel, name)
    return {"parallel": parallel, "train": {"recompute": found.train.recompute}}


def _as_overrides(change: dict[str, dict[str, Any]]) -> str:
    """The change as overrides on a command line."""
    return " ".join(
        f"{section}.{key}={'null' if value is None else str(value).lower()}"
        for section, keys in change.items()
        for key, value in keys.items()
    )
