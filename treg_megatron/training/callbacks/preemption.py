"""Graceful stop on a signal: every rank ends after the same step, which is saved."""

import signal

import lightning.pytorch as pl
import torch

#: Slurm sends the first before a time limit or preemption if the job script requests it, and the second at that point
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

#: exit code of a run that saved and stopped before its last step; the same command resumes it
EXIT_STOPPED = 85


class StopOnSignal(pl.Callback):
    """Ends the run after the step in which any rank received one of :data:`SIGNALS`.

    Ranks receive a signal at different times, in different steps, or not at all. An all-reduce (max) of their flags at
    the end of every step makes all of them stop after the same step. ``SaveEvery``, which runs later in the step, saves
    whenever the trainer is about to stop.
    """

    def __init__(self):
        self.received = 0
        self.stopped_by: str | None = None
        self._listen()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._listen()  # Lightning has installed its own handlers, which stop each rank separately

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        flag = torch.tensor(self.received, device=module.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        if flag.item() and trainer.global_step < trainer.max_steps:
            self.stopped_by = signal.Signals(flag.item()).name
            trainer.should_stop = True

    def settle(self) -> None:
        """Ignore signals from here on: when one rank exits, srun signals the others; they must keep their exit code."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame) -> None:
        self.received = number
