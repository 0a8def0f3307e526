"""Convert a model between a Hugging Face folder and a Megatron checkpoint.

    python tools/convert_checkpoint.py import --hf MODEL --checkpoint CHECKPOINT
    python tools/convert_checkpoint.py export --checkpoint RUN_OR_CHECKPOINT --base MODEL --output FOLDER
    python tools/convert_checkpoint.py import --recipe recipes/X.yaml

`import` reads safetensors and writes the checkpoint that training starts from; it loads at any tensor- and
pipeline-parallel size, so one import serves every cluster. `export` reads an imported or a training checkpoint of any
parallel size (of a run's folder: the newest complete one) and writes a folder that transformers loads, with the
tokenizer and chat template of the base model.

Both stream: memory holds about one tensor, whatever the size of the model. Both are exact: import followed by export
gives the original weights bit for bit. Both write beside their output and rename at the end, so that an output that
exists is whole. No GPU is used.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from treg_megatron import errors, recipe  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="import|export")
    importer = commands.add_parser("import", help="Hugging Face folder to Megatron checkpoint")
    recipe.add_section_arguments(importer, "model")
    exporter = commands.add_parser("export", help="Megatron checkpoint to Hugging Face folder")
    recipe.add_section_arguments(exporter, "export")
    arguments = parser.parse_args()
    if arguments.command == "import":
        run_import(recipe.parse_section(arguments, "model"))
    else:
        run_export(recipe.parse_section(arguments, "export"))


def run_import(model: recipe.ModelSection) -> None:
    from treg_megatron.checkpoint.from_hf import import_checkpoint

    start = time.monotonic()
    identity = import_checkpoint(model.hf, model.checkpoint, progress=True)
    print(f"imported {identity.family} ({identity.dtype}) to {model.checkpoint} in {time.monotonic() - start:.1f} s")


def run_export(export: recipe.ExportSection) -> None:
    from treg_megatron.checkpoint.to_hf import export_checkpoint

    start = time.monotonic()
    exported = export_checkpoint(export.checkpoint, export.base, export.output, export.dtype, progress=True)
    print(f"exported {exported.checkpoint} ({exported.dtype}, {exported.nbytes / 1e9:.2f} GB in {exported.files} "
          f"file{'s' if exported.files > 1 else ''}) to {export.output} in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    errors.run(main)
