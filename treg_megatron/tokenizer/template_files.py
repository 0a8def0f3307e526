"""Which chat template of a tokenizer's folder is used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.utils.files import read_json

DEFAULT = "default"
_OLDER_FILE = "chat_template.json"  # of multimodal models' processors


def chosen_template(found: str | Mapping[str, str] | None, folder: Path, name: str = "") -> str:
    """Text of the chat template to use.

    Args:
        found: what the tokenizer brings: a template, or several by name.
        folder: the tokenizer's folder.
        name: the one to use; empty for the only one or the one named ``default``.

    Raises:
        UserError: there is none, none of that name, or several and no default.
    """
    templates = found or _from_older_file(folder)
    if not templates:
        raise UserError(f"the tokenizer of {folder} has no chat template; use the instruction-tuned model's tokenizer")
    by_name = {DEFAULT: templates} if isinstance(templates, str) else dict(templates)
    if (name or DEFAULT) in by_name:
        return by_name[name or DEFAULT]
    names = ", ".join(sorted(by_name))
    if name:
        raise UserError(f"the tokenizer of {folder} has no chat template named {name}, only {names}")
    raise UserError(
        f"the tokenizer of {folder} has several chat templates and none is the default: {names}; "
        "name one (label.template, --template), or save it as chat_template.jinja in that folder"
    )


def _from_older_file(folder: Path) -> Any:
    path = folder / _OLDER_FILE
    if not path.is_file():
        return None
    templates = read_json(path).get("chat_template")
    if isinstance(templates, list) and all(isinstance(one, dict) for one in templates):
        templates = {one.get("name"): one.get("template") for one in templates}
    texts = list(templates.values()) if isinstance(templates, dict) else [templates]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path} holds no chat template")
    return templates
