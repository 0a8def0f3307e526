"""A log of the pairs that each step trained on, which shows that a run saw every pair once per epoch."""

import json
from pathlib import Path

import lightning.pytorch as pl
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MegatronStep

from treg_megatron.data.sampler import RECORD
from treg_megatron.training.callbacks.metrics import forget_after


class PairRecord(pl.Callback):
    """Writes the ids of the pairs whose gradients went into each optimizer step.

    In each data-parallel replica, one rank of the last pipeline stage writes, because the loss is computed there. As
    with the metrics, a resumed run drops the lines of the steps that it repeats.
    """

    def __init__(self, run: Path):
        self.folder = Path(run) / RECORD
        self.pairs: list[str] = []

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.glob("rank_*.jsonl"):  # of all ranks: the earlier run may have had more
                forget_after(path, trainer.global_step)
        trainer.strategy.barrier()

    def on_megatron_step_end(self, step: MegatronStep, microbatch_outputs: list[dict], **_) -> None:
        if not step.forward_only:
            self.pairs = [pair for micro_batch in microbatch_outputs or [] for pair in micro_batch["pair_ids"]]

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        if (
            parallel_state.is_pipeline_last_stage(ignore_virtual=True)
            and parallel_state.get_tensor_and_context_parallel_rank() == 0
        ):
            path = self.folder / f"rank_{parallel_state.get_data_parallel_rank():05d}.jsonl"
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": trainer.global_step, "pairs": self.pairs}) + "\n")
