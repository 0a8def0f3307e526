"""The station ``index``: labelled pairs to aligned Megatron streams."""

from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.labels import labelling_run, read_labelled
from treg_megatron.recipe import IndexSection
from treg_megatron.streams import write_streams
from treg_megatron.tokens import load_tokenizer


def index(section: IndexSection) -> dict[str, Any]:
    """Write ``section.labelled`` as streams under the prefix ``section.output``, and return their manifest.

    Raises:
        UserError: labels that are unfinished, invalid, or made with another tokenizer than ``section.tokenizer``.
    """
    tokenizer = load_tokenizer(section.tokenizer)
    run = labelling_run(section.labelled)
    if run is not None and run["tokenizer"]["sha256"] != tokenizer.sha256:
        raise UserError(f"{section.labelled} was made with another tokenizer than that of {section.tokenizer}: "
                        "label with the tokenizer of the model that is trained, or name the one that labelled")
    return write_streams(section.output, read_labelled(section.labelled), tokenizer, run)
