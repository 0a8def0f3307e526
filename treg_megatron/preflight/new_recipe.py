"""A new recipe: the fastest layout that is safe on a cluster, written as YAML with its reasons."""

from typing import NamedTuple

from treg_megatron.config.recipe import RECIPES, load_recipe
from treg_megatron.errors import UserError
from treg_megatron.models.architecture import hf_config_of
from treg_megatron.models.families import family_of, model_fields
from treg_megatron.preflight import labelling, report
from treg_megatron.preflight.gpus import GPUS
from treg_megatron.preflight.plan import Plan, Sections, make_plan
from treg_megatron.preflight.search import Layout, fitting, layouts, split_of

#: share of a GPU's memory that a new recipe may use: predictions have not been compared with a GPU
SAFE = 0.95
#: layouts that are built before a cluster counts as too small
MOST_BUILT = 12
#: numbers of nodes that are tried when a model does not fit
LARGER = (*range(1, 17), *range(18, 40, 2), *range(40, 129, 8))
GB = 1e9


class Choice(NamedTuple):
    """The layout chosen, with every stage built, and its neighbours in the order of speed."""

    plan: Plan
    faster: Layout | None  # by formula, and closest to fitting; does not fit
    slower: Layout | None


def choose(sections: Sections) -> Choice:
    """The fastest layout that uses at most :data:`SAFE` of the memory.

    Raises:
        UserError: no layout fits; the message names the smallest cluster of such nodes that would do.
    """
    if sections.lora.rank:
        sections = sections.with_keys(lora={"targets": _targets(hf_config_of(sections.model), sections.lora.targets)})
    found = next(fitting(sections, SAFE, MOST_BUILT), None)
    if found is None:
        raise UserError(_refusal(sections))
    plan = make_plan(found.sections)
    order = layouts(sections)
    place = next(i for i, each in enumerate(order) if each.sections == found.sections)
    key = split_of(found.sections)
    others = [
        each for each in order[place + 1 :] if split_of(each.sections) != key and each.least_memory <= plan.memory
    ]
    faster = [each for each in order[:place] if split_of(each.sections) != key]
    return Choice(plan, min(faster, key=lambda each: each.least_memory, default=None), others[0] if others else None)


def _refusal(sections: Sections) -> str:
    cluster = sections.cluster
    order = layouts(sections)
    here = f"{cluster.nodes} x {cluster.gpus_per_node} GPUs of {cluster.gpu_memory:g} GB"
    if not order:
        why = (
            f"no layout divides the model's layers and heads and data.global_batch_size="
            f"{sections.data.global_batch_size} over {sections.ranks} GPUs"
        )
    else:
        least = min(each.least_memory for each in order)
        why = (
            f"the leanest layout needs at least {least / GB:.0f} GB per GPU"
            if least > SAFE * cluster.gpu_memory * GB
            else f"no layout needs less than {SAFE:.0%} of the memory"
        )
    for nodes in LARGER:
        larger = sections.with_keys(cluster={"nodes": nodes})
        if nodes > cluster.nodes and next(fitting(larger, SAFE, MOST_BUILT), None) is not None:
            return f"does not fit {here}: {why}; the smallest cluster of such nodes that fits has {nodes}"
    return f"does not fit {here}: {why}; nor does it fit {LARGER[-1]} such nodes"


def text(choice: Choice, name: str, own: list[str]) -> str:
    """The recipe as YAML.

    Args:
        own: ``section.key=value`` of the model and of what the user set.
    """
    plan = choice.plan
    sections = plan.sections
    parallel, lora, defaults = sections.parallel, sections.lora, load_recipe(RECIPES / "family" / "gpu.yaml")
    keys: dict[str, dict[str, object]] = {
        "model": {},
        "label": _label(plan),
        "parallel": {},
        "lora": {},
        "optimizer": {},
    }
    for word in own:
        path, value = word.split("=", 1)
        section, key = path.split(".", 1)
        keys.setdefault(section, {})[key] = value
    for key in ("tensor", "pipeline", "virtual_pipeline", "expert", "context", "sequence"):
        if getattr(parallel, key) != defaults.parallel[key]:
            keys["parallel"][key] = getattr(parallel, key)
    if lora.rank:
        keys["lora"] = {"rank": lora.rank}
        if lora.targets != list(defaults.lora.targets):
            keys["lora"]["targets"] = f"[{', '.join(lora.targets)}]"
        keys["optimizer"] = {"lr": sections.optimizer.lr}
    keys["train"] = keys.get("train", {})
    if sections.train.recompute != defaults.train.recompute:
        keys["train"]["recompute"] = sections.train.recompute
    keys["cluster"] = _cluster(sections) | keys.get("cluster", {})
    lines = [*_heading(choice, name), "defaults: family/gpu.yaml", f"name: {name}"]
    for section, values in keys.items():
        if values:
            lines += ["", f"{section}:", *(f"  {key}: {_yaml(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _targets(hf_config: dict, wanted: list[str]) -> list[str]:
    """The layers of ``wanted`` that can have adapters."""
    from treg_megatron.models.lora import without_adapters  # imports NeMo

    experts = bool(model_fields(hf_config).get("num_moe_experts"))
    without = without_adapters(experts, family_of(hf_config).post_layer_norms)
    return [target for target in wanted if target not in without]


def _heading(choice: Choice, name: str) -> list[str]:
    plan, cluster = choice.plan, choice.plan.sections.cluster
    nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''} of {cluster.gpus_per_node} GPUs"
    lines = [
        f"# srun --nodes {cluster.nodes} --ntasks-per-node {cluster.gpus_per_node} python -m treg_megatron.train "
        f"--recipe {name}",
        "#",
        f"# {'Adapters' if plan.frozen else 'All weights'} of {plan.trainable + plan.frozen:,} parameters. Hardware: "
        f"{nodes} with {cluster.gpu_memory:g} GB.",
        "#",
        "# Hyper-parameters: not searched for this model. beta and alpha are those of Llama-3-8B in the T-REG paper",
        f"# (base.yaml), {'rank and lr common practice for adapters' if plan.frozen else 'as is lr'}.",
        "#",
        f"# Layout, by `treg recipe new`: {report.layout(plan.sections, plan.data_ranks)}.",
        f"# * memory per stage, predicted: {_memory(plan)} of {cluster.gpu_memory:g} GB",
        f"# * pipeline bubble: {bubbles(plan)}",
    ]
    here = next(each for each in layouts(plan.sections) if each.sections == plan.sections).seconds
    if choice.faster:
        other = choice.faster
        least = other.least_memory / GB
        needs = f"needs at least {least:.0f} GB" if least > SAFE * cluster.gpu_memory else "does not fit once built"
        lines.append(f"# * not {_short(other)}: {1 - other.seconds / here:.0%} faster by estimate, but it {needs}")
    if choice.slower:
        other = choice.slower
        lines.append(f"# * next: {_short(other)}, {other.seconds / here - 1:+.0%} time per step by estimate")
    return lines


def bubbles(plan: Plan) -> str:
    """The pipeline bubble with the longest pairs and with ordinary ones, as a phrase."""
    parallel, data = plan.sections.parallel, plan.sections.data
    if parallel.pipeline == 1:
        return "none"
    short = f" ({plan.bubble_of_short_pairs:.1%} if pairs are a third as long)" if data.layout == "bins" else ""
    return f"{plan.bubble:.1%}{short}"


def _memory(plan: Plan) -> str:
    return ", ".join(f"{stage.total / GB:.1f}" for stage in plan.stages.values())


def _short(layout: Layout) -> str:
    parallel, train = layout.sections.parallel, layout.sections.train
    sizes = [f"tensor {parallel.tensor}", f"pipeline {parallel.pipeline}"]
    sizes += [f"expert {parallel.expert}"] * (parallel.expert > 1) + [f"recompute {train.recompute}"]
    return ", ".join(sizes)


def _label(plan: Plan) -> dict[str, object]:
    """How the reference model runs: whole in each process, or split where a GPU cannot hold it."""
    sections = plan.sections
    fields = model_fields(hf_config_of(sections.model))
    parameters = plan.trainable + plan.frozen
    if "TOO MUCH" not in labelling.fit(parameters, sections.label, fields, sections.cluster):
        return {}
    best = next(labelling.splits(parameters, sections.label, fields, sections.cluster), None)
    if best is None:
        return {}
    sizes = {"tensor": best.tensor, "pipeline": best.pipeline}
    return {"engine": "megatron", **{key: size for key, size in sizes.items() if size > 1}}


def _cluster(sections: Sections) -> dict[str, object]:
    cluster = sections.cluster
    keys: dict[str, object] = {"nodes": cluster.nodes} if cluster.nodes > 1 else {}
    keys |= {"gpus_per_node": cluster.gpus_per_node} if cluster.gpus_per_node != 8 else {}
    keys |= {"gpu": cluster.gpu} if cluster.gpu != "h100" else {}
    if cluster.gpu_memory != GPUS[str(cluster.gpu)].memory:
        keys["gpu_memory"] = cluster.gpu_memory
    return keys


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.1e}".replace("e-0", "e-") if isinstance(value, float) and value < 0.01 else str(value)
