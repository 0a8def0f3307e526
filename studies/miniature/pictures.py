"""Figures of the study's report as PNG files; the same results give the same bytes."""

import io
from pathlib import Path

import numpy as np

from studies.miniature.configuration import Study
from studies.miniature.measure import load_arrays
from studies.miniature.model import vocabulary
from studies.miniature.pipeline import result_path
from studies.miniature.results import Results
from treg_megatron.data.labelled_pairs import SIDES, read_labelled
from treg_megatron.utils.files import atomic_write

CURVES = {
    "rewards/accuracies": "training pairs ordered rightly",
    "rewards/margins": "reward margin",
    "logps/chosen": "log-prob of the chosen",
    "logps/rejected": "log-prob of the rejected",
}
SMOOTHED_STEPS = 8
EXAMPLES = 3
FULL_COLOUR = 0.95  # quantile of a row's magnitudes that gets the full colour: each row has its own scale


def draw_all(results: Results, regularised: str, folder: Path) -> dict[str, str]:
    """Write all figures into ``folder``; return their paths relative to the report, which is next to that folder."""
    import matplotlib

    matplotlib.use("agg")
    figures = {
        "curves": learning_curves(results),
        "tokens": token_picture(results, regularised),
        "search": search_picture(results.study),
    }
    for name, figure in figures.items():
        _save(figure, folder / f"{name}.png")
    return {name: f"{folder.name}/{name}.png" for name in figures}


def learning_curves(results: Results):
    """Training metrics by step, mean over seeds, one line per method."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(16, 4), layout="constrained")
    colours = pyplot.get_cmap("tab20")
    for axis, (name, title) in zip(axes, CURVES.items()):
        for number, (method, runs) in enumerate(results.runs.items()):
            if name == "rewards/margins" and results.study.methods[method]["grid"] != "dpo":
                continue  # their rewards have different units
            mean = np.mean([run[f"curve/{name}"] for run in runs], axis=0)
            window = min(SMOOTHED_STEPS, len(mean))
            axis.plot(
                np.arange(window, len(mean) + 1),
                np.convolve(mean, np.full(window, 1 / window), "valid"),
                color=colours(number),
                label=method,
                linewidth=1.2,
            )
        axis.set_title(title)
        axis.set_xlabel("step")
    axes[0].legend(fontsize=7)
    return figure


def search_picture(study: Study):
    """Score of sampled answers to development prompts over KL from the reference, one point per search run."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    colours = pyplot.get_cmap("tab20")
    for number, method in enumerate(study.methods):
        found = [load_arrays(result_path(study, run.name, "dev")) for run in study.search_runs if run.method == method]
        points = sorted((run["kl"].mean(), run["sampled/score"].mean()) for run in found)
        axis.plot(*zip(*points), marker="o", markersize=4, linewidth=0.8, color=colours(number), label=method)
    axis.set_xscale("log")
    axis.set_xlabel("KL from the reference, nats an answer")
    axis.set_ylabel("score, sampled")
    axis.legend(fontsize=7)
    return figure


def token_picture(results: Results, regularised: str):
    """Heat map of answers by token: the verifier's marks, r_t, and the log-ratios of trained policies."""
    from matplotlib import pyplot
    from matplotlib.colors import LinearSegmentedColormap

    orange_to_blue = LinearSegmentedColormap.from_list("reward", ["#d95f02", "#ffffff", "#2166ac"])
    rows = {"verifier": np.where(results.credit["right"], 1.0, -1.0), "r_t": results.credit["reward"]}
    for method in dict.fromkeys(("dpo", regularised, "truth")):
        if method in results.runs:
            rows[method] = np.mean([run["implicit"] for run in results.runs[method]], axis=0)
    answers = _answers_with_errors(results)
    figure, axes = pyplot.subplots(
        len(answers), 1, figsize=(16, 2.2 * len(answers)), layout="constrained", squeeze=False
    )
    for axis, (title, tokens, span) in zip(axes[:, 0], answers):
        values = np.stack([of[span] / np.quantile(np.abs(of), FULL_COLOUR) for of in rows.values()])
        axis.imshow(values, cmap=orange_to_blue, vmin=-1, vmax=1, aspect="auto")
        axis.set_yticks(range(len(rows)), rows)
        axis.set_xticks(range(len(tokens)), tokens)
        axis.set_title(title, loc="left")
    return figure


def _answers_with_errors(results: Results) -> list[tuple[str, list[str], slice]]:
    """Title, tokens and range in the credit set of the first answers with at least two wrong tokens."""
    found, at = [], 0
    for pair in read_labelled(results.study.run / "labelled" / "test"):
        for side in SIDES:
            response = len(getattr(pair, f"{side}_token_rewards"))
            span = slice(at, at + response)
            at += response
            if (~results.credit["right"][span]).sum() >= 2 and len(found) < EXAMPLES:
                tokens = [vocabulary()[i] for i in getattr(pair, f"{side}_tokens")[-response:]]
                found.append((f"{pair.prompt} ({side})", tokens, span))
                break
    return found


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80, metadata={"Software": None})
    pyplot.close(figure)
    with atomic_write(path) as partial:
        partial.write_bytes(buffer.getvalue())
