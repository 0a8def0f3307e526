"""Figures of the study's report as PNG files; the same results give the same bytes."""

import io
from pathlib import Path

import numpy as np

from studies.miniature.configuration import FORMS, Study
from studies.miniature.measure import load_arrays
from studies.miniature.model import vocabulary
from studies.miniature.pipeline import labelled_path, result_path
from studies.miniature.results import Results
from treg_megatron.data.labelled_pairs import SIDES, read_labelled
from treg_megatron.utils.files import atomic_write

CURVES = {
    "rewards/accuracies": "training pairs ordered rightly",
    "rewards/margins": "reward margin",
    "logps/chosen": "log-prob of the chosen",
    "logps/rejected": "log-prob of the rejected",
}
DRAWN = ("dpo", "dpo_reg", "static", "implicit", "implicit_frozen", "dpo_sft", "simpo", "simpo_reg", "sft", "truth")
MARKERS = "osD^v<>P"  # of the references
SMOOTHED_STEPS = 8
EXAMPLES = 3
FULL_COLOUR = 0.95  # quantile of a row's magnitudes that gets the full colour: each row has its own scale


def draw_all(results: Results, folder: Path) -> dict[str, str]:
    """Write all figures into ``folder``; return their paths relative to the report, which is next to that folder."""
    import matplotlib

    matplotlib.use("agg")
    figures = {
        "differences": difference_picture(results),
        "curves": learning_curves(results),
        "tokens": token_picture(results),
        "search": search_picture(results.study),
    }
    for name, figure in figures.items():
        _save(figure, folder / f"{name}.png")
    return {name: f"{folder.name}/{name}.png" for name in figures}


def difference_picture(results: Results):
    """Difference in score of every method to `dpo`: over all references with its interval, and with each of them."""
    from matplotlib import pyplot

    found = [comparison for (_, other), (comparison, _) in results.family.items() if other == "dpo"]
    found.sort(key=lambda comparison: comparison.score.value)
    figure, axis = pyplot.subplots(figsize=(9, 0.3 * len(found) + 1.2), layout="constrained")
    axis.axvline(0, color="grey", linewidth=0.8)
    rows = range(len(found))
    axis.hlines(rows, *zip(*((each.score.low, each.score.high) for each in found)), color="black", linewidth=2)
    for number, reference in enumerate(results.references):
        values = [comparison.by_reference[number].value for comparison in found]
        axis.plot(values, rows, MARKERS[number % len(MARKERS)], markersize=5, alpha=0.7, label=reference.name)
    axis.set_yticks(rows, [comparison.method for comparison in found])
    axis.set_xlabel("score less that of dpo")
    figure.legend(loc="outside upper center", ncols=len(results.references), fontsize=8)
    return figure


def learning_curves(results: Results):
    """Training metrics by step of the first reference's runs, mean over seeds, one line per method."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(CURVES), figsize=(16, 4), layout="constrained")
    for axis, (name, title) in zip(axes, CURVES.items()):
        for method in _drawn(results.study):
            if name == "rewards/margins" and results.study.methods[method]["grid"] != "dpo":
                continue  # their rewards have different units
            mean = np.mean([run[f"curve/{name}"] for run in results.runs[method][0]], axis=0)
            window = min(SMOOTHED_STEPS, len(mean))
            axis.plot(
                np.arange(window, len(mean) + 1),
                np.convolve(mean, np.full(window, 1 / window), "valid"),
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

    figure, axes = pyplot.subplots(
        1, len(study.references), figsize=(4 * len(study.references), 4), layout="constrained", squeeze=False
    )
    for axis, reference in zip(axes[0], study.references):
        for method in _drawn(study):
            found = [
                load_arrays(result_path(reference, run.name, "dev"))
                for run in reference.search_runs
                if run.method == method
            ]
            points = sorted((run["kl"].mean(), run["sampled/score"].mean()) for run in found)
            axis.plot(*zip(*points), marker="o", markersize=4, linewidth=0.8, label=method)
        axis.set_xscale("log")
        axis.set_title(reference.name)
        axis.set_xlabel("KL from the reference, nats an answer")
    axes[0][0].set_ylabel("score, sampled")
    axes[0][0].legend(fontsize=7)
    return figure


def _drawn(study: Study) -> list[str]:
    """The methods of pictures that would be too full with all of them."""
    return [method for method in study.methods if method in DRAWN]


def token_picture(results: Results):
    """Heat map of the first reference's answers by token: the verifier's marks, r_t, and the policies' log-ratios."""
    from matplotlib import pyplot
    from matplotlib.colors import LinearSegmentedColormap

    orange_to_blue = LinearSegmentedColormap.from_list("reward", ["#d95f02", "#ffffff", "#2166ac"])
    credit = results.credit[0]
    rows = {"verifier": np.where(credit["right"], 1.0, -1.0), "r_t": credit[f"reward/{FORMS[0]}"]}
    for method in ("dpo", "dpo_reg", "truth"):
        rows[method] = np.mean([run["implicit"] for run in results.runs[method][0]], axis=0)
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
    for pair in read_labelled(labelled_path(results.references[0], "test", FORMS[0])):
        for side in SIDES:
            response = len(getattr(pair, f"{side}_token_rewards"))
            span = slice(at, at + response)
            at += response
            if (~results.credit[0]["right"][span]).sum() >= 2 and len(found) < EXAMPLES:
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
