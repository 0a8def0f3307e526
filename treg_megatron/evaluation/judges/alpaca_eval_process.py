"""One of alpaca_eval's annotators as a process: a script for a Python in which the package alpaca_eval is installed.

It stands by itself, so that the package can have an environment of its own. Standard input has one task per line, as
JSON, standard output one answer per line, and the process ends with its input.

The first line configures the annotator: ``annotator`` (its name), ``model`` and ``api_key``. The answer is ``{}``.
Every other line is a task: ``base_url``, ``outputs_1`` and ``outputs_2``, lists of records in alpaca_eval's form. The
answer has ``annotations``, alpaca_eval's own records in the same order, and ``switched``, which of them were judged
with output_2 shown first.
"""

import json
import os
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print belongs to the log

    def answer(content: dict) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    annotator = open_annotator(**json.loads(sys.stdin.readline()))
    answer({})
    for line in sys.stdin:
        answer(annotate(annotator, **json.loads(line)))


def open_annotator(annotator: str, model: str, api_key: str):
    """The annotator as it is configured in the package, but for the model that it asks."""
    import yaml
    from alpaca_eval import constants
    from alpaca_eval.annotators import PairwiseAnnotator

    folder = constants.EVALUATORS_CONFIG_DIR / annotator
    if not (folder / "configs.yaml").is_file():
        known = sorted(path.parent.name for path in constants.EVALUATORS_CONFIG_DIR.glob("*/configs.yaml"))
        sys.exit(f"alpaca_eval has no annotator {annotator}; it has {', '.join(known)}")
    configs = yaml.safe_load((folder / "configs.yaml").read_text(encoding="utf-8"))
    for config in configs.values():
        if config.get("fn_completions") != "openai_completions":
            sys.exit(f"alpaca_eval's annotator {annotator} asks by {config.get('fn_completions')}, not a chat server")
        config["completions_kwargs"] |= {
            "model_name": model,
            "requires_chatml": True,
            "client_config_path": os.devnull,  # not a file: the next two are used
            "openai_api_keys": api_key,
            "openai_organization_ids": [None],
            "client_kwargs": {"max_retries": 0, "timeout": None},  # both are the proxy's
        }

    class Annotator(PairwiseAnnotator):
        """Takes its configuration as a value instead of a path."""

        def _initialize_annotators(self, **kwargs):
            return {
                name: self.SingleAnnotator(
                    seed=self.seed,
                    base_dir=constants.EVALUATORS_CONFIG_DIR,
                    annotation_column=self.annotation_key,
                    completion_column=self.completion_key,
                    **config,
                    **kwargs,
                )
                for name, config in configs.items()
            }

    return Annotator(annotators_config=annotator, caching_path=None, is_avoid_reannotations=False)


def annotate(annotator, base_url: str, outputs_1: list, outputs_2: list) -> dict:
    """The annotations of a task, and which were judged with output_2 shown first."""
    import pandas as pd

    for single in annotator.annotators.values():
        single.completions_kwargs["openai_api_base"] = base_url
    annotations = annotator.annotate_head2head(
        outputs_1=outputs_1, outputs_2=outputs_2, is_ordered=True, chunksize=None
    )
    records = json.loads(pd.DataFrame(annotations).to_json(orient="records", double_precision=15))
    return {"annotations": records, "switched": switched(annotator, outputs_1, outputs_2)}


def switched(annotator, outputs_1: list, outputs_2: list) -> list:
    """Whether the annotator shows output_2 first, by its own processor."""
    import pandas as pd
    from alpaca_eval.processors import RandomSwitchTwoColumnsProcessor

    pairs = pd.DataFrame(
        [
            {"instruction": one["instruction"], "output_1": one["output"], "output_2": two["output"]}
            for one, two in zip(outputs_1, outputs_2, strict=True)
        ]
    )
    for single in annotator.annotators.values():
        for processor in single.processors:
            if isinstance(processor, RandomSwitchTwoColumnsProcessor):
                return [bool(value) for value in processor.preprocess(pairs)["is_switched_outputs"]]
    return [False] * len(pairs)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, which has a module alpaca_eval of its own
    main()
