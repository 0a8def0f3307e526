"""Length-controlled win rates by ``alpaca_eval``'s own code, as a program of its own.

    python alpaca_eval_winrate.py INPUT OUTPUT

It runs in whichever interpreter has alpaca_eval, and therefore imports nothing of this package. Both files are JSON:

    INPUT   {"gamed": path of df_gamed.csv or null, "positions": [of each prompt in the benchmark],
             "arms": [[annotations in alpaca_eval's form], ...], "draws": [[row numbers], ...]}
    OUTPUT  {"version": ..., "arms": [{"win_rate", "length_controlled", "resampled": [one per draw]}, ...]}

The annotations of all arms are of the same prompts in the same order. A line on standard output follows each fit.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.pop(0)  # this folder, whose modules are called like some of other packages

# Read when alpaca_eval is imported. Everything it needs is in INPUT: nothing is fetched.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")


def main(source: str, target: str) -> None:
    """Read INPUT, write OUTPUT."""
    import alpaca_eval
    import pandas as pd
    from alpaca_eval.metrics import glm_winrate

    asked = json.loads(Path(source).read_text(encoding="utf-8"))
    positions = pd.Index(asked["positions"], name="index")
    with tempfile.TemporaryDirectory() as folder:
        gamed = asked["gamed"]
        if gamed is None:
            # The minimal form does not use the difficulty of an instruction, but its code looks it up.
            gamed = Path(folder) / "df_gamed.csv"
            unused = pd.DataFrame({"index": range(positions.max() + 1), "model": "", "instruction_difficulty": 0.0})
            unused.to_csv(gamed, index=False)
        glm_winrate.hf_hub_download = lambda **_: str(gamed)
        form = "length_controlled_minimal" if asked["gamed"] is None else "length_controlled_v1"

        def metrics(annotations: pd.DataFrame) -> dict[str, float]:
            found = glm_winrate.get_length_controlled_winrate(
                annotations,
                glm_name=form,
                save_weights_dir=None,
                is_add_glm_preference_inplace=False,
                is_warn_extreme_changes=False,
            )
            print("fitted", flush=True)
            return found

        results = []
        for annotations in asked["arms"]:
            frame = pd.DataFrame(annotations, index=positions)
            whole = metrics(frame)
            results.append(
                {
                    "win_rate": float(whole["win_rate"]),
                    "length_controlled": float(whole["length_controlled_winrate"]),
                    "resampled": [
                        float(metrics(frame.iloc[drawn])["length_controlled_winrate"]) for drawn in asked["draws"]
                    ],
                }
            )
    written = {"version": alpaca_eval.__version__, "arms": results}
    Path(target).write_text(json.dumps(written), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
