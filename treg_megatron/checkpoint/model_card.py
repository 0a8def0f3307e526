"""The README.md of an exported model: which model it came from and which run made it."""

import re
from pathlib import Path
from typing import Any

import yaml

from treg_megatron.checkpoint.layout import Identity


def model_card(identity: Identity, run: dict[str, Any]) -> str:
    """Model card in Markdown with Hugging Face's YAML header.

    ``run`` is any nested dictionary of plain values and is told as it is; empty: a plain conversion.
    """
    name = identity.hf_config.get("_name_or_path", "")
    base = name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else Path(identity.source).name
    header = {"base_model": base, "library_name": "transformers", "pipeline_tag": "text-generation"}
    if run:
        header["tags"] = ["preference-optimization", "treg"]
    text = f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n"
    if not run:
        return text + f"# {base}\n\n{base}, converted from a Megatron checkpoint and not trained further.\n"
    details = yaml.safe_dump(run, sort_keys=False, allow_unicode=True)
    return text + (f"# {base}, aligned with T-REG\n\n"
                   f"{base} after preference optimization with token-level reward regularization "
                   f"([T-REG](https://arxiv.org/abs/2412.02685)), trained with treg-megatron.\n\n"
                   f"## The run\n\n```yaml\n{details}```\n")
