"""The checks, in order of what they tell: the first that fails is the one to look into."""

import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path

from treg_megatron.accept import numerics
from treg_megatron.accept.check import Check, Failed, Machine, NotRun, losses_of, run_python, started
from treg_megatron.accept.inputs import STEPS, WideRun, prepare, recipe, train, wide_run
from treg_megatron.distributed.cpu_redirect import DEVICES_VARIABLE

Figures = Sequence[tuple[str, float, str]]

LOSSES = Path(__file__).parent / "losses.json"
#: relative tolerance of a training loss against the one computed on the CPU in fp32
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
TENSOR_OVERLAP = ["parallel.tensor_overlap=true", "data.layout=bins"]
#: by name: ranks, precision and overrides of the recipe
LAYOUTS: dict[str, tuple[int, str, list[str]]] = {
    "packed": (1, "fp32", []),
    "padded": (1, "fp32", ["data.layout=padded"]),
    "packed bf16": (1, "bf16", []),
    "TP2": (2, "fp32", ["parallel.tensor=2"]),
    "PP2": (2, "fp32", ["parallel.pipeline=2"]),
    "CP2": (2, "fp32", ["parallel.context=2"]),
    "DP2": (2, "fp32", []),
    "TP2+SP bf16": (2, "bf16", ["parallel.tensor=2", "parallel.sequence=true"]),
    "TP2+SP overlap": (2, "bf16", ["parallel.tensor=2", "parallel.sequence=true", *TENSOR_OVERLAP]),
    "offload": (1, "fp32", ["optimizer.offload=0.5"]),
    "TP2xPP2": (4, "fp32", ["parallel.tensor=2", "parallel.pipeline=2"]),
    "CP2xTP2 bf16": (4, "bf16", ["parallel.context=2", "parallel.tensor=2"]),
    "TP2xPP2xDP2": (8, "fp32", ["parallel.tensor=2", "parallel.pipeline=2"]),
}
LABEL_TOLERANCE = 1e-4  # of a token reward in fp32
#: measured memory as a part of preflight's prediction: it must leave what was promised, and not promise too little
MEMORY_RANGE = (0.8, 1.08)
#: TFLOP/s of a GPU in bf16 without sparsity, by a part of its name (NVIDIA's data sheets)
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "B200": 2250}


def expected_losses() -> list[float]:
    """The losses of the shipped run: fp32, one CPU rank."""
    return json.loads(LOSSES.read_text())["losses"]


def inputs(folder: Path, machine: Machine) -> Figures:
    """Label, index and import the tiny model."""
    prepare(folder)
    return []


def collectives(folder: Path, machine: Machine) -> Figures:
    """Every kind of collective over all ranks."""
    printed = run_python(folder / "collectives.log", "-m", "treg_megatron.accept.collectives", ranks=machine.ranks)
    rate = json.loads(printed.splitlines()[-1])["all_reduce_gb_per_s"]
    return [("all_reduce", rate, "GB/s")]


def head(folder: Path, machine: Machine) -> Figures:
    """The head against float64."""
    printed = run_python(folder / "head.log", "-m", "treg_megatron.accept.numerics")
    measured = json.loads(printed.splitlines()[-1])
    for dtype, tolerance in numerics.TOLERANCE.items():
        error = measured[f"head_error_{str(dtype).removeprefix('torch.')}"]
        if not error <= tolerance:
            raise Failed(f"log-probs or gradients in {dtype} differ from float64 by {error:.1e}, allowed {tolerance:g}")
    units = {"head_peak_gb": "GB", "head_ms": "ms"}
    return [(name, value, units.get(name, "")) for name, value in measured.items()]


def training(name: str):
    """A check that trains in one layout and compares the losses with the shipped ones."""
    ranks, precision, overrides = LAYOUTS[name]

    def run(folder: Path, machine: Machine) -> Figures:
        if ranks > machine.ranks:
            raise NotRun(f"needs {ranks} ranks, here are {machine.ranks}")
        if TENSOR_OVERLAP[0] in overrides and not (machine.gpus and _has_transformer_engine()):
            raise NotRun("needs Transformer Engine on a GPU")
        run_folder = train(folder, _file(name), ranks, *overrides, *_in_precision(precision, machine))
        return [("largest_difference", _compare(losses_of(run_folder), TOLERANCE[precision]), "of the loss")]

    return run


def without_transformer_engine(folder: Path, machine: Machine) -> Figures:
    """The same training with torch's layers, where Transformer Engine would be taken."""
    if not _has_transformer_engine():
        raise NotRun("Transformer Engine is not installed")
    if not machine.gpus:
        raise NotRun("needs a GPU")
    run_folder = train(folder, "without_te", 1, *_in_precision("fp32", machine), hide=["transformer_engine"])
    return [("largest_difference", _compare(losses_of(run_folder), TOLERANCE["fp32"]), "of the loss")]


def killed_and_resumed(folder: Path, machine: Machine) -> Figures:
    """SIGKILL after the first checkpoint; the same command must end with the losses of a run that was left alone."""
    ranks = min(machine.ranks, 2)
    overrides = ["train.save_every=2", f"parallel.pipeline={ranks}", *_in_precision("fp32", machine)]
    run_folder = folder / "killed"
    command = ["-m", "treg_megatron.train", *recipe(folder, f"train.output={run_folder}", *overrides)]
    with started(folder / "killed.log", *command, ranks=ranks) as process:
        while not list(run_folder.glob("checkpoints/step_*/treg.json")):
            if process.poll() is not None:
                raise Failed("the run ended before its first checkpoint; see killed.log")
            time.sleep(0.02)
    train(folder, "killed", ranks, *overrides)
    losses = losses_of(run_folder)
    if len(losses) != STEPS:
        raise Failed(f"{len(losses)} steps are recorded, not {STEPS}")
    return [("largest_difference", _compare(losses, TOLERANCE["fp32"]), "of the loss")]


def exported(folder: Path, machine: Machine) -> Figures:
    """The run that was resumed, as a Hugging Face folder; Megatron's and transformers' log-probs of it agree."""
    if not (folder / "killed" / "checkpoints").is_dir():
        raise NotRun("needs the checkpoint of `resume`")
    log = folder / "export.log"
    run_python(
        log,
        "-m",
        "treg_megatron",
        "export",
        *recipe(folder, f"export.checkpoint={folder}/killed", f"export.output={folder}/exported"),
    )
    printed = run_python(log, "-m", "treg_megatron", "verify", folder / "killed", folder / "exported")
    return [] if "verdict: the same" in printed else _fail(printed.splitlines()[-1])


def labels(engine: str):
    """A check that labels on this machine's device and compares with labels made on the CPU."""

    def run(folder: Path, machine: Machine) -> Figures:
        name = f"labels_{engine}"
        settings = [f"label.engine={engine}", f"label.output={folder}/{name}", f"label.checkpoint={folder}/megatron"]
        run_python(folder / f"{name}.log", "-m", "treg_megatron", "label", *recipe(folder, *settings))
        largest = _label_difference(folder / name, folder / "labelled" / "train")
        if not largest <= LABEL_TOLERANCE:
            raise Failed(f"a token reward differs by {largest:.1e} from the CPU's, allowed {LABEL_TOLERANCE:g}")
        return [("largest_difference", largest, "of a token reward")]

    return run


def memory(folder: Path, machine: Machine) -> Figures:
    """Peak of torch's allocator in a step of one rank, against preflight's prediction for it."""
    run = wide_run(folder, machine, 1)
    printed = run_python(
        folder / "memory.log",
        *("-m", "treg_megatron.accept.predicted", *run.overrides),
        CUDA_VISIBLE_DEVICES="",
        **{DEVICES_VARIABLE: ""},
    )
    predicted = json.loads(printed.splitlines()[-1])["peak_bytes"]
    measured = _measured_steps(folder / "memory.log", 1, run.overrides)["peak_bytes"]
    figures = [("predicted", predicted / 1e9, "GB")]
    if not machine.gpus:
        raise NotRun("CPU ranks have no allocator that counts; a tiny model was planned and trained", figures)
    return [*figures, ("measured", measured / 1e9, "GB"), ("ratio", compare_memory(measured, predicted), "")]


def compare_memory(measured: float, predicted: float) -> float:
    """Measured over predicted bytes.

    Raises:
        Failed: they are too far apart.
    """
    low, high = MEMORY_RANGE
    ratio = measured / predicted
    if not low <= ratio <= high:
        raise Failed(
            f"{measured / 1e9:.2f} GB were allocated, preflight predicts {predicted / 1e9:.2f}; {ratio:.2f} of it, "
            f"allowed {low:g} to {high:g}"
        )
    return ratio


def speed(overlap: bool):
    """A check of the rate at which all ranks train the wide model, with or without overlapped communication."""

    def run(folder: Path, machine: Machine) -> Figures:
        ranks = machine.ranks if machine.gpus else 2
        if overlap and ranks == 1:
            raise NotRun("one GPU has no communication to overlap")
        wide = wide_run(folder, machine, ranks)
        keys = [f"parallel.{key}={str(overlap).lower()}" for key in ("overlap_grad_reduce", "overlap_param_gather")]
        name = "speed_overlapped" if overlap else "speed"
        seconds = _measured_steps(folder / f"{name}.log", ranks, [*wide.overrides, *keys])["seconds"]
        if not machine.gpus:
            raise NotRun("a rate needs a GPU; a tiny model was trained")
        return rates(wide, seconds, ranks, _gpu_name())

    return run


def rates(wide: WideRun, seconds: float, ranks: int, gpu: str) -> Figures:
    """Tokens and pairs per second of all ranks, TFLOP/s of one, and the utilisation (MFU) of a GPU that is known."""
    from treg_megatron.models.families import model_fields
    from treg_megatron.preflight.costs import FORWARD_AND_BACKWARD, forward_flops

    work = forward_flops(model_fields(wide.config), wide.length, wide.length - 1).total
    tflops = FORWARD_AND_BACKWARD * 2 * wide.pairs * work / seconds / ranks / 1e12
    peak = next((peak for name, peak in PEAK_TFLOPS.items() if name in gpu), None)
    return [
        ("tokens", 2 * wide.length * wide.pairs / seconds, "1/s"),
        ("pairs", wide.pairs / seconds, "1/s"),
        ("rate", tflops, "TFLOP/s per GPU"),
        *([("MFU", tflops / peak, "")] if peak else []),
    ]


def host_syncs(folder: Path, machine: Machine) -> Figures:
    """Waits of the host inside a micro-batch, by torch's sync debug mode, or by device labels on CPU ranks."""
    layout = ["parallel.tensor=2", "parallel.pipeline=2"] if machine.ranks >= 4 else []
    overrides = [
        f"run={folder}",
        f"model.hf={folder}/hf",
        "data.validation=null",
        "data.epochs=10",
        "data.seq_length=512",
        "data.micro_batch_size=2",
        "data.global_batch_size=8",
        "data.share_prompts=false",
        "train.precision=bf16",
        *layout,
    ]
    variables = {} if machine.gpus else {DEVICES_VARIABLE: "labelled"}
    ranks = 4 if layout else 1
    waits = _measured_steps(folder / "host_syncs.log", ranks, ["--waits", *overrides], **variables)["waits"]
    ours = {place: count for place, count in waits.items() if not place.startswith("transformer_engine/")}
    if ours:
        most = max(ours, key=lambda place: ours[place])
        raise Failed(f"the host waits {sum(ours.values()):g} times per micro-batch, most often at {most}")
    return [("host_syncs", sum(ours.values()), "per micro-batch"), ("in_transformer_engine", sum(waits.values()), "")]


def _measured_steps(log: Path, ranks: int, arguments: list[str], **variables: str) -> dict:
    printed = run_python(log, "-m", "treg_megatron.accept.steps", *arguments, ranks=ranks, **variables)
    return json.loads(printed.splitlines()[-1])


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_properties(0).name


def _has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def _in_precision(precision: str, machine: Machine) -> list[str]:
    """Overrides: a precision, and how far its first loss may be from that of the CPU's labels."""
    tolerance = 0.05 if precision == "bf16" else 0.001 if machine.gpus else 0.0001
    return [f"train.precision={precision}", f"train.first_loss_tolerance={tolerance}"]


def _compare(found: list[float], tolerance: float) -> float:
    expected = expected_losses()
    if len(found) != len(expected):
        raise Failed(f"{len(found)} steps are recorded, not {len(expected)}")
    differences = [abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True)]
    for step, difference in enumerate(differences, 1):
        if not difference <= tolerance:
            raise Failed(
                f"the loss of step {step} is {found[step - 1]:.6f}, the CPU's is {expected[step - 1]:.6f}; "
                f"{difference:.1e} of it, allowed {tolerance:g}"
            )
    return max(differences)


def _label_difference(a: Path, b: Path) -> float:
    import numpy as np

    from treg_megatron.data.labelled_pairs import read_labelled

    largest = 0.0
    for ours, theirs in zip(read_labelled(a), read_labelled(b), strict=True):
        if ours.pair_id != theirs.pair_id:
            raise Failed(f"pair {theirs.pair_id} is missing")
        for side in ("chosen", "rejected"):
            x, y = (np.asarray(getattr(pair, f"{side}_token_rewards")) for pair in (ours, theirs))
            largest = max(largest, float(np.abs(x - y).max()))
    return largest


def _fail(message: str) -> Figures:
    raise Failed(message)


def _file(name: str) -> str:
    return "train_" + name.replace(" ", "_").replace("+", "_")


CHECKS = [
    Check("inputs", "do labelling, indexing and importing run at all?", inputs),
    Check("collectives", "does every kind of collective give the right sums over all ranks?", collectives),
    Check("head", "are log-probs and gradients of the head those of float64?", head),
    *(
        Check(f"train {name}", "are the training losses those of the CPU?", training(name), seconds=240)
        for name in LAYOUTS
    ),
    Check("without TE", "do torch's layers give the losses of Transformer Engine's?", without_transformer_engine),
    Check("resume", "does a killed run resume to the same losses?", killed_and_resumed, seconds=300),
    Check("export", "does the exported model compute what Megatron's does?", exported),
    Check("labels huggingface", "are token rewards of this device those of the CPU?", labels("huggingface")),
    Check("labels megatron", "are token rewards of the Megatron engine those of transformers?", labels("megatron")),
    Check("host syncs", "does the host never wait for the device inside a micro-batch?", host_syncs),
    Check("memory", "does a step take the memory that preflight predicts?", memory, seconds=300),
    Check("speed", "how fast does a model as wide as an 8B one train, without overlap?", speed(False), seconds=300),
    Check("speed overlapped", "and with overlapped communication?", speed(True), seconds=300),
]
