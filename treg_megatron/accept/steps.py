"""Steps of training that are measured and not saved, as one rank; rank 0 prints what it found as one line of JSON.

    torchrun ... -m treg_megatron.accept.steps [--waits] KEY=VALUE ...

The model of ``model.hf`` has Megatron's random weights: it needs a config.json and nothing else.
"""

import argparse
import json
import time
import warnings
from collections import Counter
from typing import Any

from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.distributed.connections import set_connections
from treg_megatron.distributed.launch import RankInfo, destroy_process_group, init_process_group, rank_info
from treg_megatron.utils import entry
from treg_megatron.utils.imports import heavy_imports

WARM_UP, STEPS = 3, 8
TIMEOUT_SECONDS = 120.0
SYNC_WARNING = "called a synchronizing CUDA operation"  # torch's, in its sync debug mode


def main() -> None:
    """Train, and print seconds per step, bytes at the peak of the fullest rank, and waits per micro-batch by place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waits", action="store_true", help="count the waits of the host, which slows the steps down")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the recipe")
    arguments = parser.parse_args()
    ranks = rank_info()  # Lightning forgets them at the end
    measured = measure(load_recipe(overrides=arguments.overrides), ranks, arguments.waits)
    if ranks.rank == 0:
        print(json.dumps(measured))
    destroy_process_group()


def measure(recipe: Any, ranks: RankInfo, count_waits: bool) -> dict[str, Any]:
    """Train for :data:`STEPS` steps; what was measured after the first :data:`WARM_UP`, over all ranks."""
    import torch

    data, parallel, optimizer, train = (section(recipe, name) for name in ("data", "parallel", "optimizer", "train"))
    set_connections(parallel)
    if not torch.cuda.is_available():
        from treg_megatron.distributed.cpu_redirect import use_cpu

        use_cpu()
    with heavy_imports():
        from treg_megatron.data.streams import open_streams
        from treg_megatron.models.architecture import hf_config_of
        from treg_megatron.models.build import build_policy, policy_config
        from treg_megatron.objective import Objective
        from treg_megatron.training import build
        from treg_megatron.training.data_module import PairData

    init_process_group(ranks, TIMEOUT_SECONDS)
    waits = Waits() if count_waits else None
    steps = measured_steps(waits)
    config = policy_config(hf_config_of(section(recipe, "model")), parallel, train)
    objective = Objective.of(section(recipe, "objective"))
    trainer = build.trainer(ranks, build.strategy(parallel, train, initial_weights=None), train, STEPS, [steps])
    policy = build_policy(config, objective, build.optimizer(optimizer, train, STEPS))
    trainer.fit(policy, datamodule=PairData(data, open_streams(data.train), None, parallel))
    own = {
        "seconds": steps.seconds / (STEPS - WARM_UP),
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "waits": waits.per_micro_batch() if waits else {},
    }
    found: list[Any] = [None] * ranks.size
    torch.distributed.all_gather_object(found, own)
    return {
        "seconds": max(rank["seconds"] for rank in found),
        "peak_bytes": max(rank["peak_bytes"] for rank in found),
        "waits": max((rank["waits"] for rank in found), key=lambda places: sum(places.values())),
    }


def measured_steps(waits: "Waits | None") -> Any:
    """A Lightning callback whose ``seconds`` are those of all steps after the warm-up."""
    import lightning.pytorch as pl
    import torch

    class MeasuredSteps(pl.Callback):
        seconds = 0.0

        def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            torch.cuda.synchronize()
            now = time.perf_counter()
            if trainer.global_step == WARM_UP:
                self.started = now
                torch.cuda.reset_peak_memory_stats()
                if waits is not None:
                    waits.begin()
            elif trainer.global_step == STEPS:
                self.seconds = now - self.started

    return MeasuredSteps()


class Waits:
    """Waits of the host for the device while micro-batches are in flight, by place in the code.

    On a GPU, torch's sync debug mode reports them; on CPU ranks device labels do (``TREG_CPU_DEVICES=labelled``).
    """

    def __init__(self) -> None:
        import torch

        from treg_megatron.distributed import device_labels
        from treg_megatron.distributed.micro_batches import watch_micro_batches

        self._places: Counter[str] = Counter()
        self._micro_batches = self._in_flight = 0
        self._labels = device_labels.labels
        self._on_gpu = torch.cuda.is_available()
        if self._labels is not None:
            self._labels.raises = False
        elif self._on_gpu:
            self._show = warnings.showwarning
            warnings.filterwarnings("always", message=SYNC_WARNING)
            warnings.showwarning = self._warned
        watch_micro_batches(self._changed)

    def begin(self) -> None:
        """Forget what was counted: from here on it counts."""
        self._places.clear()
        self._micro_batches = 0
        if self._labels is not None:
            self._labels.faults.clear()

    def per_micro_batch(self) -> dict[str, float]:
        """Waits per micro-batch by place."""
        places = self._places if self._labels is None else self._labels.faults
        return {place: count / max(1, self._micro_batches) for place, count in places.items()}

    def _changed(self, in_flight: int) -> None:
        import torch

        self._micro_batches += in_flight > self._in_flight
        self._in_flight = in_flight
        if self._on_gpu:
            torch.cuda.set_sync_debug_mode("warn" if in_flight else "default")

    def _warned(self, message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if SYNC_WARNING in str(message):
            self._places[f"{filename.rpartition('site-packages/')[2]}:{lineno}"] += 1
        else:
            self._show(message, category, filename, lineno, *rest)


if __name__ == "__main__":
    entry.run(main)
