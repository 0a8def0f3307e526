"""The functions that a conversation may call, as the text of a JSON list."""

import json
from typing import Any


def tools_text(value: Any, name: str) -> str:
    """A list of function definitions, or its JSON text, as JSON text; empty if there are none.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(f"{name} is not the JSON text of a list of functions") from None
    if value in (None, "", [], {}) or (isinstance(value, str) and not value.strip()):
        return ""
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"{name} must be a list of functions, each an object")
    return json.dumps(value, ensure_ascii=False)
