"""Text from data as a terminal may show it."""

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def without_control_bytes(text: str) -> str:
    """The text with control bytes, and marks that turn its direction round, escaped; tabs and line breaks stay."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
