"""Stacked bar chart of the memory of each pipeline stage."""

from pathlib import Path

from treg_megatron.errors import UserError
from treg_megatron.preflight.plan import Plan
from treg_megatron.preflight.report import GB, layout
from treg_megatron.utils.files import atomic_write

#: colour of each part: blues for what stays between steps, warm colours for temporaries, greys for allowances
COLOURS = {
    "weights": "#08519c",
    "gradients": "#3182bd",
    "main parameters": "#6baed6",
    "optimizer state": "#bdd7e7",
    "activations": "#e6550d",
    "working memory": "#fdae6b",
    "log-prob head": "#a63603",
    "communication": "#969696",
    "fragmentation": "#d9d9d9",
}


def plot(plan: Plan, name: str, path: Path) -> None:
    """Write the chart of a plan as a PNG.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(max(6.4, 2.8 + 0.55 * len(plan.stages)), 4.4), layout="constrained")
    axes = figure.add_subplot()
    stages = list(plan.stages)
    bottom = [0.0] * len(stages)
    for part, colour in COLOURS.items():
        heights = [plan.stages[stage].parts[part] / GB for stage in stages]
        if any(heights):
            axes.bar([str(stage) for stage in stages], heights, bottom=bottom, color=colour, label=part, width=0.7)
            bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.axhline(plan.memory / GB, color="#b30000", linewidth=1.5, linestyle="--")
    axes.annotate(
        f"{plan.memory / GB:g} GB per rank",
        (1.0, plan.memory / GB),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        color="#b30000",
        fontsize=8,
    )
    axes.set_ylim(0, 1.12 * max(*bottom, plan.memory / GB))
    axes.set_xlabel("pipeline stage")
    axes.set_ylabel("memory per rank, GB")
    axes.set_title(f"{name}\n{layout(plan.sections, plan.data_ranks)}", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=8)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png", dpi=150)
