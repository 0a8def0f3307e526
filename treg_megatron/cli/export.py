"""Turn a Megatron checkpoint into a Hugging Face folder that transformers loads.

    treg export --recipe llama3_8b
    treg export --checkpoint RUN_OR_CHECKPOINT --base MODEL --output FOLDER
    treg export --recipe llama3_8b_lora --lora adapter

Reads an imported or a training checkpoint of any parallel size; for a run's folder, its newest complete one. Writes the
weights with the tokenizer and chat template of the base model, beside the output, and renames at the end. The export
streams and is exact. Next: treg verify, or any tool that loads Hugging Face models.
"""

import argparse
import time

from treg_megatron.cli.arguments import parse_section, section_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg export``."""
    return section_parser(prog, __doc__, "export")


def run(arguments: argparse.Namespace) -> None:
    """Export, and print what was written."""
    export = parse_section(arguments, "export")
    from treg_megatron.checkpoint.to_hf import export_adapter, export_checkpoint

    start = time.monotonic()
    if export.lora == "adapter":
        exported = export_adapter(export.checkpoint, export.base, export.output)
    else:
        exported = export_checkpoint(
            export.checkpoint,
            export.base,
            export.output,
            export.dtype,
            shard_bytes=round(export.shard_size * 1e9),
            progress=True,
        )
    print(
        f"exported {exported.checkpoint} ({exported.dtype}, {exported.nbytes / 1e9:.2f} GB in {exported.files} "
        f"file{'s' if exported.files > 1 else ''}) to {export.output} in {time.monotonic() - start:.1f} s"
    )
