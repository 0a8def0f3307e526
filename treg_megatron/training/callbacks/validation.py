"""Validation on held-out pairs: before the first step, every so many steps, and after the last."""

import lightning.pytorch as pl
import torch

from treg_megatron.training.callbacks.metrics import RunMetrics


class ValidateEvery(pl.Callback):
    """Runs all validation pairs, forward only, through Megatron's schedule.

    Lightning's own validation loop cannot run at step 0, and it counts micro-batches where Megatron counts steps.
    """

    def __init__(self, steps: int, metrics: RunMetrics):
        self.steps, self.metrics = steps, metrics

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self._validate(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        if trainer.global_step % self.steps == 0 or trainer.global_step == trainer.max_steps:
            self._validate(trainer)

    @torch.no_grad()
    def _validate(self, trainer: pl.Trainer) -> None:
        loader = trainer.datamodule.val_dataloader()
        micro_batches = iter(loader)
        model = trainer.strategy.model
        model.eval()
        for _ in range(loader.batch_sampler.steps):
            model.validation_step(micro_batches)
        model.train()
        self.metrics.write_validation(trainer)
