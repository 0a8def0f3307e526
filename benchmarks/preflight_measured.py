"""Print the table of docs/PREFLIGHT.md: predicted and measured memory for every model, layout and recompute mode.

python benchmarks/preflight_measured.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.support.forked import run_ranks, warm_up  # noqa: E402
from tests.support.preflight_ranks import LAYOUTS, MODELS, measure_on_this_rank, predict_in_this_process  # noqa: E402


def main() -> None:
    warm_up()
    for model, config in MODELS.items():
        tensor = "TP3" if config["num_attention_heads"] % 2 else "TP2"
        for layout in ("TP1", tensor, "PP2", f"{tensor}xPP2"):
            for recompute in ("none", "selective", "full"):
                case = (config, layout, "fp32", recompute)
                measured = run_ranks(LAYOUTS[layout][0], measure_on_this_rank, *case)
                predicted = run_ranks(1, predict_in_this_process, *case)[0]
                for rank, (real, found) in enumerate(zip(measured, predicted, strict=True)):
                    print(
                        f"| {model} | {layout} | {recompute} | {rank} | {'yes' if real[:4] == found[:4] else 'NO'} | "
                        f"{found.peak / 1e6:.2f} | {real.peak / 1e6:.2f} | {found.peak / real.peak - 1:+.1%} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
