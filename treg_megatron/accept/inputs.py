"""What the checks share: a tiny model, labelled pairs, an aligned dataset and an imported checkpoint.

Also a model as wide as one of 8B with few layers, and pairs of full length, to measure rates and memory.
"""

import json
from pathlib import Path
from typing import NamedTuple

from treg_megatron.accept.check import Machine, NotRun, run_python
from treg_megatron.accept.tiny import CONFIG, write_model, write_pairs

STEPS = 6
#: layers of the wide model by the memory of a GPU that one rank needs to train it, in GB (10^9 bytes)
LAYERS = {60: 4, 36: 2}


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


class WideRun(NamedTuple):
    """Training steps of a wide model.

    Attributes:
        config: its config.json.
        length: tokens of every sequence.
        pairs: pairs per step.
        overrides: keys of the recipe.
    """

    config: dict
    length: int
    pairs: int
    overrides: list[str]


def wide_run(folder: Path, machine: Machine, ranks: int) -> WideRun:
    """Write what training the wide model on ``ranks`` ranks needs; on CPU ranks it is the tiny one, on short pairs.

    Raises:
        NotRun: the GPUs are too small.
    """
    config, length, precision = CONFIG, 64, "fp32"
    if machine.gpus:
        config, length, precision = wide_config(_memory()), 2048, "bf16"
    pairs, run = 4 * ranks, folder / f"wide_{ranks}"
    run.mkdir(exist_ok=True)
    (run / "config.json").write_text(json.dumps(config))
    _write_pairs_of_full_length(run / "pairs", pairs, length, folder / "hf")
    overrides = [
        f"run={run}",
        f"model.hf={run}",
        f"data.train={run}/pairs",
        "data.validation=null",
        "data.epochs=100",
        f"data.seq_length={length}",
        f"data.global_batch_size={pairs}",
        "data.share_prompts=false",
        f"train.precision={precision}",
        f"cluster.device={'gpu' if machine.gpus else 'cpu'}",
        f"cluster.gpus_per_node={ranks}",
    ]
    return WideRun(config, length, pairs, overrides)


def wide_config(memory: float) -> dict:
    """The config.json of Llama 3 8B, with as many layers as fit ``memory`` bytes.

    Raises:
        NotRun: not even the fewest do.
    """
    from treg_megatron.models.architecture import PUBLISHED

    for gigabytes, layers in LAYERS.items():
        if memory >= gigabytes * 1e9:
            return json.loads((PUBLISHED / "llama3_8b.json").read_text()) | {"num_hidden_layers": layers}
    raise NotRun(f"needs a GPU with {min(LAYERS)} GB of memory, here are {memory / 1e9:.0f}")


def _memory() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def _write_pairs_of_full_length(prefix: Path, count: int, length: int, tokenizer: Path) -> None:
    import numpy as np

    from treg_megatron.data.labelled_pairs import LabelledPair
    from treg_megatron.data.streams import write_streams
    from treg_megatron.tokenizer.chat import load_tokenizer

    tokens, values = np.zeros(length, dtype=np.int32), np.zeros(length - 1, dtype=np.float32)
    pairs = (LabelledPair(f"p{i}", tokens, tokens, *[values] * 4) for i in range(count))
    write_streams(prefix, pairs, load_tokenizer(tokenizer))
