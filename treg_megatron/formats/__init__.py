"""Preference formats, one declaration per file, and their table.

To add a format: declare a :class:`~treg_megatron.formats.pair_format.PairFormat` in a file of its own, and name it in
:data:`FORMATS`.
"""

from treg_megatron.errors import UserError
from treg_megatron.formats.alpaca import ALPACA, ALPACA_OUTPUT
from treg_megatron.formats.distilabel import DISTILABEL
from treg_megatron.formats.helpsteer import HELPSTEER2, HELPSTEER3
from treg_megatron.formats.hh import HH
from treg_megatron.formats.nectar import NECTAR
from treg_megatron.formats.nemo import ARGILLA, NEMO_ALIGNER, NEMO_RL
from treg_megatron.formats.openai import OPENAI
from treg_megatron.formats.orca import ORCA, ORCA_ARGILLA
from treg_megatron.formats.pair_format import PairFormat
from treg_megatron.formats.pku import PKU_BETTER, PKU_SAFER
from treg_megatron.formats.sharegpt import AXOLOTL, SHAREGPT
from treg_megatron.formats.shp import SHP
from treg_megatron.formats.simpo import SIMPO
from treg_megatron.formats.swift import SWIFT
from treg_megatron.formats.trl import TRL, TRL_IMPLICIT, TRL_IMPLICIT_TEXT
from treg_megatron.formats.ultrafeedback import ULTRAFEEDBACK, ULTRAFEEDBACK_PUBLISHED

AUTO = "auto"  # recognise the format from the first record

#: Order matters: the first format that matches the first record is used, so formats with more columns come first.
FORMATS = (
    SHAREGPT,
    SIMPO,
    NEMO_RL,
    NEMO_ALIGNER,
    ARGILLA,
    SWIFT,
    HELPSTEER3,
    HELPSTEER2,
    PKU_BETTER,
    PKU_SAFER,
    SHP,
    OPENAI,
    NECTAR,
    ULTRAFEEDBACK_PUBLISHED,
    DISTILABEL,
    ULTRAFEEDBACK,
    TRL,
    AXOLOTL,
    ALPACA,
    ALPACA_OUTPUT,
    ORCA,
    ORCA_ARGILLA,
    TRL_IMPLICIT,
    HH,
    TRL_IMPLICIT_TEXT,
)

_SHOWN_NEAREST = 3


def recognise(row: dict) -> PairFormat:
    """Detect the format of a record.

    Raises:
        ValueError: no format matches; the message lists the record's keys and what the nearest formats lack.
    """
    for format in FORMATS:
        if format.matches(row):
            return format
    keys = ", ".join(map(repr, row)) or "none"
    raise ValueError(
        f"unrecognised preference format with keys {keys}; {_what_it_may_be(row)}; or say which column is what: "
        "--columns prompt=COLUMN chosen=COLUMN rejected=COLUMN (treg inspect --help lists the formats)"
    )


def format_named(name: str) -> PairFormat:
    """Look up a format by name.

    Raises:
        UserError: no format has this name.
    """
    for format in FORMATS:
        if format.name == name:
            return format
    raise UserError(f"pairs format {name!r} is not known; choose {AUTO} or one of {', '.join(f.name for f in FORMATS)}")


def _what_it_may_be(row: dict) -> str:
    if {"completion", "label"} <= row.keys():
        return "one answer and a label are KTO's data, but a preference needs two answers to one prompt"
    if any(key.endswith("input_ids") for key in row):
        return "token ids cannot be read as text: give the data set before its tokenization"
    if not TRL_IMPLICIT_TEXT.missing(row):
        return (
            "chosen and rejected have no prompt beside them; if their common beginning is the prompt, say so: "
            f"--format {TRL_IMPLICIT_TEXT.name}"
        )
    near = sorted(
        (format for format in FORMATS if len(format.missing(row)) < len(format.needs)),
        key=lambda format: len(format.missing(row)) / len(format.needs),
    )[:_SHOWN_NEAREST]
    if not near:
        return "no format has one of these"
    lacks = [f"{format.name} lacks {', '.join(format.missing(row)) or 'the right types'}" for format in near]
    return f"nearest: {'; '.join(lacks)}"
