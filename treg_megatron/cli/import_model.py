"""Turn a Hugging Face folder into the Megatron checkpoint that training starts from.

    treg import --hf MODEL --checkpoint CHECKPOINT
    treg import --recipe llama3_8b model.hf=MODEL

Reads config.json and safetensors. The checkpoint loads at any tensor- and pipeline-parallel size, so one import serves
every cluster. The import streams (memory holds about one tensor, whatever the size of the model), is exact (exporting
gives the original weights bit for bit), writes beside its output and renames at the end, and uses no GPU.
Next: treg label.
"""

import argparse
import time

from treg_megatron.cli.arguments import parse_section, section_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg import``."""
    return section_parser(prog, __doc__, "model")


def run(arguments: argparse.Namespace) -> None:
    """Import, and print what was written."""
    model = parse_section(arguments, "model")
    from treg_megatron.checkpoint.from_hf import import_checkpoint

    start = time.monotonic()
    identity = import_checkpoint(model.hf, model.checkpoint, progress=True)
    print(f"imported {identity.family} ({identity.dtype}) to {model.checkpoint} in {time.monotonic() - start:.1f} s")
