"""Model card (README.md) of an exported model: its base model and the run that trained it."""

import re
from pathlib import Path
from typing import Any

import yaml

from treg_megatron.checkpoint.layout import CheckpointMetadata

PAPER = "[T-REG](https://arxiv.org/abs/2412.02685)"


def model_card(identity: CheckpointMetadata, run: dict[str, Any]) -> str:
    """The model card in Markdown, with Hugging Face's YAML header.

    Args:
        run: plain values, empty for a conversion without training. ``recipe``, ``data`` (the training set's manifest)
            and ``metrics`` (the run's last, of ``step``) get a section each if present, as does any other key.
    """
    name = identity.hf_config.get("_name_or_path", "")
    base = name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else Path(identity.source).name
    header = {"base_model": base, "library_name": "transformers", "pipeline_tag": "text-generation"}
    if not run:
        return (
            f"{_front_matter(header)}# {base}\n\n"
            f"{base}, converted from a Megatron checkpoint and not trained further.\n"
        )
    objective = run.get("recipe", {}).get("objective", {})
    method = _method(objective)
    step = f" of step {run['step']}" if "step" in run else ""
    sections = {
        "Objective": objective,
        f"Metrics{step}": run.get("metrics"),
        "Training data": run.get("data"),
        "Recipe": run.get("recipe"),
        **{key: value for key, value in run.items() if key not in ("metrics", "data", "recipe", "step")},
    }
    return (
        _front_matter({**header, "tags": ["preference-optimization", "treg-megatron"]})
        + f"# {base}, after {method}\n\n{base} after training with the objective {method} by treg-megatron.\n\n"
        + "\n".join(
            f"## {title}\n\n```yaml\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}```\n"
            for title, content in sections.items()
            if content
        )
    )


def _method(objective: dict[str, Any]) -> str:
    name = objective.get("loss_type", "").upper() or "preference optimization"
    regularized = objective.get("alpha") and objective.get("token_rewards") != "none"
    return f"{name} with {PAPER}" if regularized else name


def _front_matter(header: dict[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n"
