"""Stopping on a signal: every rank ends after the same step, and that step is saved."""

import signal

import lightning.pytorch as pl
import torch

#: Slurm sends the first before a time limit or a preemption where a script asks for it, the second when it means it
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

#: exit code of a run that saved and stopped before its last step: start it again and it goes on
EXIT_STOPPED = 85


class StopOnSignal(pl.Callback):
    """Ends the run after the step in which any rank got one of :data:`SIGNALS`.

    Ranks get a signal at different moments and in different steps, or not at all. So they take the largest of their
    flags at the end of every step: all see the same answer after the same step. ``SaveEvery``, which runs later in the
    step, saves whenever the trainer is to stop.
    """

    def __init__(self):
        self.received = 0
        self.stopped_by: str | None = None
        self._listen()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._listen()  # Lightning has put handlers of its own there, which stop each rank by itself

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        flag = torch.tensor(self.received, device=module.device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        if flag.item() and trainer.global_step < trainer.max_steps:
            self.stopped_by = signal.Signals(flag.item()).name
            trainer.should_stop = True

    def settle(self) -> None:
        """Ignore signals from here on: the first rank to exit has srun end the others, whose exit code must be their own."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _listen(self) -> None:
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame) -> None:
        self.received = number
