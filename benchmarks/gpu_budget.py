"""How often a micro-batch makes the host wait for a GPU, and how many kernels it launches; needs no GPU.

    python benchmarks/gpu_budget.py            # about two minutes on two cores

Trains one step of a tiny Llama on CPU ranks with device labels (treg_megatron/distributed/device_labels.py), with 1, 4
and 16 pairs per micro-batch, and takes the rank with the largest count:

    host_syncs           waits for the device between the start of a micro-batch and the end of its backward pass
    launches_per_layer   operators of a layer's forward pass, outside attention; each launches at least one kernel
    launches_loss        operators of the loss, forward pass

None should grow with the number of pairs. The layers are the plain PyTorch ones: Transformer Engine launches fewer.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.support import forked  # noqa: E402
from tests.support.training import TinyRun, make_run, train_on_this_rank  # noqa: E402

LAYOUTS = {
    "TP2xPP2 packed": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "CP2 packed": (2, ["parallel.context=2"]),
}
PAIRS = 16  # of a step
UNITS = {"host_syncs": " per_microbatch", "launches_per_layer": "", "launches_loss": ""}


class OneStep(Exception):
    """The step has been counted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 4, 16], help="pairs per micro-batch")
    parser.add_argument("--places", action="store_true", help="print where the host waits")
    arguments = parser.parse_args()
    forked.warm_up()
    forked.TIMEOUT_SECONDS = 900
    with tempfile.TemporaryDirectory() as folder:
        files = make_run(Path(folder), tied=True)
        for name, (size, layout) in LAYOUTS.items():
            for pairs in arguments.pairs:
                output = Path(folder) / f"{name}-{pairs}"
                ranks = forked.run_ranks(size, count_one_step, files, output, pairs, layout, log=output)
                print(f"{name}, {pairs} pairs per micro-batch")
                for figure, unit in UNITS.items():
                    print(f"    figure {figure} {max(counts[figure] for counts, _ in ranks):g}{unit}", flush=True)
                for place, count in sorted({p: n for _, places in ranks for p, n in places.items()}.items()):
                    if arguments.places:
                        print(f"        {count:4} {place}")


def count_one_step(files: TinyRun, output: Path, pairs: int, layout: list[str]) -> tuple[dict, dict]:
    """On this rank, the counts of a step per micro-batch, and the places where the host waits."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from treg_megatron.distributed import device_labels
    from treg_megatron.models import policy
    from treg_megatron.training.strategy import PolicyStrategy

    labels = device_labels.install()
    labels.raises = False
    launches = {"layer": 0, "attention": 0, "loss": 0}
    calls = dict.fromkeys(launches, 0)

    def counted(what, function):
        def call(*args, **kwargs):
            before = labels.launches
            result = function(*args, **kwargs)
            launches[what] += labels.launches - before
            calls[what] += 1
            return result

        return call

    def step(self, optimizer, closure, *args, **kwargs):
        for layer in self.megatron_parallel.modules():
            if isinstance(layer, TransformerLayer):
                layer.forward = counted("layer", layer.forward)
                core = layer.self_attention.core_attention
                core.forward = counted("attention", core.forward)
        labels.faults.clear()
        closure()
        raise OneStep

    policy.preference_loss = counted("loss", policy.preference_loss)
    PolicyStrategy.optimizer_step = step
    overrides = [
        f"data.micro_batch_size={pairs}",
        f"data.global_batch_size={PAIRS}",
        "data.validation=null",
        "data.share_prompts=false",
        "train.max_steps=1",
        *layout,
    ]
    try:
        train_on_this_rank(files.recipe, files.sections(output, *overrides))
    except OneStep:
        pass
    waits = {fault: count for fault, count in labels.faults.items() if "makes the host wait" in fault}
    counts = {
        "host_syncs": sum(waits.values()) / (PAIRS // pairs),
        "launches_per_layer": (launches["layer"] - launches["attention"]) / calls["layer"],
        "launches_loss": launches["loss"] / max(1, calls["loss"]),
    }
    return counts, waits


if __name__ == "__main__":
    main()
