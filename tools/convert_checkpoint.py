"""Convert a model between a Hugging Face folder and a Megatron checkpoint.

    python tools/convert_checkpoint.py import --hf MODEL --checkpoint CHECKPOINT
    python tools/convert_checkpoint.py export --checkpoint RUN_OR_CHECKPOINT --base MODEL --output FOLDER
    python tools/convert_checkpoint.py verify A B
    python tools/convert_checkpoint.py import --recipe recipes/X.yaml

`import` reads safetensors and writes the checkpoint that training starts from; it loads at any tensor- and
pipeline-parallel size, so one import serves every cluster. `export` reads an imported or a training checkpoint of any
parallel size (of a run's folder: the newest complete one) and writes a folder that transformers loads, with the
tokenizer and chat template of the base model.

`verify` says whether two models are the same, each a Hugging Face folder, a checkpoint or a run: their weights bit for
bit, and of a checkpoint beside a folder also the log-probs that Megatron and transformers compute (in fp32, so it takes
the memory of the whole model). Exit code 0: the same, 1: different.

Import and export stream: memory holds about one tensor, whatever the size of the model. Both are exact: import followed
by export gives the original weights bit for bit. Both write beside their output and rename at the end, so that an
output that exists is whole. No GPU is used.
"""

import argparse
import sys
import time
from pathlib import Path

from treg_megatron.cli.arguments import add_section_arguments, parse_section
from treg_megatron.config.schema import ExportSection, ModelSection
from treg_megatron.utils import entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export|verify")
    importer = commands.add_parser("import", help="Hugging Face folder to Megatron checkpoint")
    add_section_arguments(importer, "model")
    exporter = commands.add_parser("export", help="Megatron checkpoint to Hugging Face folder")
    add_section_arguments(exporter, "export")
    verifier = commands.add_parser("verify", help="whether two models are the same")
    verifier.add_argument("a", metavar="A", type=Path, help="Hugging Face folder, checkpoint, or a run's folder")
    verifier.add_argument("b", metavar="B", type=Path, help="another one")
    verifier.add_argument("--text", nargs="+", help="texts whose log-probs are compared (default: three short ones)")
    arguments = parser.parse_args()
    if arguments.command == "import":
        run_import(parse_section(arguments, "model"))
    elif arguments.command == "export":
        run_export(parse_section(arguments, "export"))
    else:
        sys.exit(0 if run_verify(arguments.a, arguments.b, arguments.text) else 1)


def run_import(model: ModelSection) -> None:
    from treg_megatron.checkpoint.from_hf import import_checkpoint

    start = time.monotonic()
    identity = import_checkpoint(model.hf, model.checkpoint, progress=True)
    print(f"imported {identity.family} ({identity.dtype}) to {model.checkpoint} in {time.monotonic() - start:.1f} s")


def run_export(export: ExportSection) -> None:
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


def run_verify(a: Path, b: Path, texts: list[str] | None) -> bool:
    """Print what was compared and a verdict; whether the models are the same."""
    from treg_megatron.checkpoint.compare import compare
    from treg_megatron.checkpoint.layout import is_checkpoint

    weights = compare(a, b)
    same = not weights.different
    size = f"{weights.tensors} tensors, {weights.nbytes / 1e9:.2f} GB"
    print(
        f"weights: {size}, "
        + (
            "the same bit for bit"
            if same
            else f"{len(weights.different)} different, the first is {weights.different[0]}"
        )
    )
    if same and is_checkpoint(a) != is_checkpoint(b):
        from treg_megatron.checkpoint import logprobs

        checkpoint, hf = (a, b) if is_checkpoint(a) else (b, a)
        difference = logprobs.logprob_difference(checkpoint, hf, texts or logprobs.TEXTS)
        same = difference.largest <= logprobs.TOLERANCE
        print(
            f"log-probs: {difference.tokens} tokens by Megatron and by transformers, largest difference "
            f"{difference.largest:.1e}, allowed {logprobs.TOLERANCE:.0e}"
        )
    print(f"verdict: {'the same' if same else 'DIFFERENT'}")
    return same


if __name__ == "__main__":
    entry.run(main)
