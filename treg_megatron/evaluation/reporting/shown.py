"""Text from data as a report may show it."""

from treg_megatron.utils.terminal import without_control_bytes


def shown(text: str) -> str:
    """The text with escapes for control bytes, marks that turn its direction round, and halves of surrogate pairs."""
    return without_control_bytes(text.replace("\r\n", "\n")).encode("utf-8", "backslashreplace").decode()
