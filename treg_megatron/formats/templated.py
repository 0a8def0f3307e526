"""Text that already went through a chat template, which would be applied a second time."""

import re

_HEAD = re.compile(
    r"\s*(<\|im_start\|>|<\|begin_of_text\|>|<\|start_header_id\|>|<\|header_start\|>"
    r"|<｜begin▁of▁sentence｜>|<｜User｜>|(?:<s>\s*)?\[INST\]|<bos>|<start_of_turn>|<\|user\|>|<\|system\|>"
    r"|<\|start_of_role\|>|<\|START_OF_TURN_TOKEN\|>|<extra_id_\d+>)"
)
_END = re.compile(
    r"(<\|im_end\|>|<\|eot_id\|>|<\|eot\|>|<\|end_of_text\|>|<\|endoftext\|>|<\|end\|>|<｜end▁of▁sentence｜>|<end_of_turn>"
    r"|<eos>|</s>|<\|END_OF_TURN_TOKEN\|>)\s*\Z"
)


def beginning_of_template(text: str) -> str:
    """The marker of a turn that a text begins with, as chat templates write it; empty if there is none."""
    found = _HEAD.match(text)
    return found[1] if found else ""


def spelled_end(text: str) -> str:
    """The end-of-turn token that a text ends with, spelled out; empty if there is none."""
    found = _END.search(text, max(len(text) - 64, 0))
    return found[1] if found else ""
