"""What the checks share: a tiny model, labelled pairs, an aligned dataset and an imported checkpoint."""

from pathlib import Path

from treg_megatron.accept.check import run_python
from treg_megatron.accept.tiny import write_model, write_pairs

STEPS = 6


def prepare(folder: Path) -> None:
    """Write the inputs, on the CPU, so that checks of training do not depend on a GPU's labels."""
    write_model(folder / "hf")
    write_pairs(folder / "pairs.jsonl")
    for command in ("label", "index", "import"):
        run_python(folder / "prepare.log", "-m", "treg_megatron", command, *recipe(folder), CUDA_VISIBLE_DEVICES="")


def recipe(folder: Path, *overrides: str) -> list[str]:
    """The arguments of every command on the inputs in ``folder``."""
    return [
        *("--recipe", "tiny"),
        f"run={folder}",
        f"model.hf={folder}/hf",
        f"label.pairs={folder}/pairs.jsonl",
        "label.prompt_pair=revise",
        "label.device=auto",
        "data.validation=null",
        "data.epochs=10",
        f"train.max_steps={STEPS}",
        "train.save_every=1000",
        "train.record_pairs=false",
        *overrides,
    ]


def train(folder: Path, name: str, ranks: int, *overrides: str, **options) -> Path:
    """Train in the folder ``name``, which is returned; further arguments are those of :func:`run_python`."""
    run_python(
        folder / f"{name}.log",
        "-m",
        "treg_megatron.train",
        *recipe(folder, f"train.output={folder}/{name}", *overrides),
        ranks=ranks,
        **options,
    )
    return folder / name
