"""Text that already went through a chat template, which would be applied a second time."""

import re

_HEAD = re.compile(
    r"\s*(<\|im_start\|>|<\|begin_of_text\|>|<\|start_header_id\|>|<\|header_start\|>"
    r"|<｜begin▁of▁sentence｜>|<｜User｜>|(?:<s>\s*)?\[INST\]|<bos>|<start_of_turn>|<\|user\|>|<\|system\|>"
    r"|<\|start_of_role\|>|<\|START_OF_TURN_TOKEN\|>|<extra_id_\d+>)"
)
_LONGEST_END = 64  # characters, with white space behind it
_END = re.compile(
    r"(<\|im_end\|>|<\|eot_id\|>|<\|eot\|>|<\|end_of_text\|>|<\|endoftext\|>|<\|end\|>|<｜end▁of▁sentence｜>|<end_of_turn>"
    r"|<eos>|</s>|<\|END_OF_TURN_TOKEN\|>)\Z"
)


def beginning_of_template(text: str) -> str:
    """The marker of a turn that a text begins with, as chat templates write it; empty if there is none."""
    found = _HEAD.match(text)
    return found[1] if found else ""


def spelled_end(text: str) -> str:
    """The end-of-turn token that a text ends with, spelled out; empty if there is none."""
    end = text[-_LONGEST_END:].rstrip()
    found = _END.search(end) if end.endswith(">") else None  # as all of them do
    return found[1] if found else ""
