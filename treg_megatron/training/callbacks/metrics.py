"""Metrics of a run: metrics.jsonl, TensorBoard events and a progress bar; also the two checks that stop it.

Metrics are computed on the last pipeline stage and sent to every stage, because rank 0 writes them and all ranks must
agree on stopping.
"""

import json
import math
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MegatronStep
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from treg_megatron.errors import UserError
from treg_megatron.models.policy import StepResult
from treg_megatron.objective import PAIR_WEIGHT, means
from treg_megatron.utils.files import atomic_write

VALIDATION = "validation/"
SHOWN = {"loss": "loss", "rewards/accuracies": "acc", "rewards/margins": "margin"}


class RunMetrics(pl.Callback):
    """Collects the metrics of each step and writes them on rank 0.

    Args:
        run: the run's folder.
        steps_per_epoch: optimizer steps per epoch, to report the epoch.
        first_loss: expected preference loss of the first step, or None if it depends on the data.
        tolerance: allowed absolute deviation from it.

    Raises:
        UserError: on every rank, before the optimizer step: the first preference loss is not ``first_loss`` (policy
            and reference are different models), or a loss is not finite.
    """

    def __init__(self, run: Path, steps_per_epoch: int, first_loss: float | None, tolerance: float):
        self.run, self.steps_per_epoch = Path(run), steps_per_epoch
        self.first_loss, self.tolerance = first_loss, tolerance
        self.step_metrics: dict[str, float] = {}
        self.validation_sums: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.bar: tqdm | None = None  # on rank 0, while it trains

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.started = time.time()
        if trainer.is_global_zero:
            self.run.mkdir(parents=True, exist_ok=True)
            forget_after(self.run / "metrics.jsonl", trainer.global_step)
            self.tensorboard = SummaryWriter(str(self.run / "tensorboard"), purge_step=trainer.global_step + 1)
            self.bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, unit="step", desc="train")

    def on_megatron_step_end(self, step: MegatronStep, **_) -> None:
        reduction = (
            step.pl_module.validation_loss_reduction if step.forward_only else step.pl_module.training_loss_reduction
        )
        result = _from_last_stage(reduction.result)
        if step.forward_only:
            for name, value in result.sums.items():
                self.validation_sums[name] = self.validation_sums.get(name, 0.0) + value
            return
        self.step_metrics = {**means(result.sums), "lr": step.trainer.optimizers[0].param_groups[0]["lr"]}
        if not math.isfinite(self.step_metrics["loss"]):
            raise UserError(
                f"the loss of step {step.trainer.global_step + 1} is {self.step_metrics['loss']}, from the pairs "
                f"{', '.join(result.not_finite)}; no update was made from it, and the last checkpoint is good"
            )
        weight = self.step_metrics.get(PAIR_WEIGHT, 1.0)  # of the pairs in the mean, as the loss has it
        if step.trainer.global_step == 0 and self.first_loss is not None and weight > 0:
            _require_first_loss(self.step_metrics["loss/preference"] / weight, self.first_loss, self.tolerance)

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        metrics = {
            **self.step_metrics,
            "grad_norm": float(trainer.callback_metrics.get("grad_norm", math.nan)),
            "seconds": time.time() - self.started,
        }
        self._write({"step": step, "epoch": step / self.steps_per_epoch, **metrics})
        self.bar.set_postfix({short: f"{metrics[name]:.4g}" for name, short in SHOWN.items()}, refresh=False)
        self.bar.update()

    def write_validation(self, trainer: pl.Trainer) -> None:
        """Write the means over all forward-only steps since the last call."""
        sums, self.validation_sums = self.validation_sums, {}
        if trainer.is_global_zero:
            metrics = {VALIDATION + name: value for name, value in means(sums).items()}
            self._write({"step": trainer.global_step, **metrics})
            tqdm.write(
                f"validation at step {trainer.global_step}: "
                + ", ".join(f"{short} {metrics[VALIDATION + name]:.4g}" for name, short in SHOWN.items())
            )

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._close()  # so that the error message starts on a line of its own

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.tensorboard.close()
            self.bar = None

    def _write(self, record: dict[str, float]) -> None:
        self.last |= record
        with open(self.run / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name not in ("step", "seconds"):
                self.tensorboard.add_scalar(name, value, record["step"])


def _from_last_stage(result: StepResult) -> StepResult:
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return result
    holder = [result if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else None]
    torch.distributed.broadcast_object_list(
        holder,
        src=parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return holder[0]


def _require_first_loss(found: float, expected: float, tolerance: float) -> None:
    if abs(found - expected) > tolerance:
        raise UserError(
            f"the first preference loss is {found:.6f}, but a policy that equals its reference has {expected:.6f} "
            f"(tolerance train.first_loss_tolerance={tolerance:g}): check that model.checkpoint is the model that "
            f"labelled the pairs, that both used the same chat template, and that label.dtype and train.precision agree"
        )


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps after ``step``, which a resumed run repeats."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if step > 0 and line.endswith("\n") and json.loads(line)["step"] <= step]
        with atomic_write(path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")
