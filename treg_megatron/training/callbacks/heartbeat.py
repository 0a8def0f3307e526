"""Hang detection: reports which rank is behind when a run stalls, and ends a run that stalls for too long."""

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import torch

from treg_megatron.distributed.launch import RankInfo, node_name

logger = logging.getLogger(__name__)

QUIET_SECONDS = 60.0  # without a step before rank 0 reports what it sees; at most a quarter of hang_timeout_s
BEATS = 6  # heartbeats within that time


class Heartbeat(pl.Callback):
    """Watches one rank from a second thread.

    Every rank reports to rank 0, over a separate connection, the last step it finished and what its main thread is
    doing. While no step ends, rank 0 logs the ranks that differ from the majority. After ``hang_timeout_s`` seconds
    without a step, every rank prints the stacks of all its threads and exits. This works even if the main thread is
    blocked: a collective that never ends must not use up an allocation.

    Args:
        ranks: the processes of the job.
        hang_timeout_s: seconds; a validation micro-batch and a checkpoint also count as progress.
    """

    def __init__(self, ranks: RankInfo, hang_timeout_s: float):
        self.ranks, self.hang_timeout_s = ranks, hang_timeout_s
        self.quiet = min(QUIET_SECONDS, hang_timeout_s / 4)
        self.step, self.thread = 0, None

    def alive(self) -> None:
        """Record progress; call whenever the run makes some."""
        self.last = time.monotonic()
        faulthandler.dump_traceback_later(
            self.hang_timeout_s, exit=True
        )  # a C thread, which runs even if Python is blocked

    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        self.ended = threading.Event()  # not earlier: NeMo copies callbacks, and a lock cannot be copied
        self.alive()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.step = trainer.global_step
        self.alive()
        if self.ranks.size > 1:
            self.thread = threading.Thread(target=self._watch, args=(threading.get_ident(),), daemon=True)
            self.thread.start()

    def on_megatron_step_end(self, **_) -> None:
        self.alive()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_) -> None:
        self.step = trainer.global_step
        self.alive()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.end()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self.end()

    def end(self) -> None:
        """Stop watching."""
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()
        if self.thread is not None:
            self.thread.join(self.quiet)  # the interpreter must not exit while the thread is inside the store

    def _watch(self, main_thread: int) -> None:
        try:
            # a separate connection: the main thread may block the group's while it waits for a rank that is gone
            store = torch.distributed.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False
            )
            beats, watcher = 0, Watcher(self.ranks.size, self.quiet)
            while not self.ended.wait(self.quiet / BEATS):
                beats += 1
                doing = doing_now(main_thread)
                store.set(f"heartbeat/{self.ranks.rank}", json.dumps([beats, self.step, doing, node_name()]))
                if self.ranks.rank == 0:
                    keys = [f"heartbeat/{rank}" for rank in range(self.ranks.size)]
                    seen = {rank: json.loads(store.get(key)) for rank, key in enumerate(keys) if store.check([key])}
                    if line := watcher.look(seen, time.monotonic() - self.last):
                        logger.warning(line)
        except (torch.distributed.DistError, RuntimeError):
            return  # rank 0 has ended, and this rank will follow


class Watcher:
    """Rank 0's evaluation of the heartbeats: one line when a run stalls, and another each time the stall doubles."""

    def __init__(self, ranks: int, quiet: float):
        self.ranks, self.quiet, self.next = ranks, quiet, quiet
        self.beats: dict[int, tuple[int, float]] = {}

    def look(self, seen: dict[int, list], still: float) -> str | None:
        """A line to print, or None.

        Args:
            seen: for each rank ``[beats, last finished step, what its main thread does, node]``.
            still: seconds without progress on rank 0.
        """
        now = time.monotonic()
        for rank, (beats, *_) in seen.items():
            if self.beats.get(rank, (None,))[0] != beats:
                self.beats[rank] = (beats, now)
        if still < self.quiet:
            self.next = self.quiet
        if still < self.next:
            return None
        self.next = 2 * still
        silent = {rank: now - self.beats[rank][1] for rank in seen if now - self.beats[rank][1] > self.quiet / 2}
        groups = Counter((seen[rank][1], seen[rank][2]) for rank in seen if rank not in silent)
        behind = [
            f"rank {rank} on {seen[rank][3]}: no sign of life for {age:.0f} s, last step {seen[rank][1]}"
            for rank, age in silent.items()
        ]
        behind += [f"rank {rank}: no heartbeat received" for rank in range(self.ranks) if rank not in seen]
        for (step, doing), _ in reversed(groups.most_common()[1:]):
            behind += [
                f"rank {rank} on {seen[rank][3]}: in {doing} after step {step}"
                for rank in sorted(seen)
                if rank not in silent and (seen[rank][1], seen[rank][2]) == (step, doing)
            ]
        most = ""
        if groups:
            (step, doing), count = groups.most_common(1)[0]
            most = f"; {count} of {self.ranks} ranks are in {doing} after step {step}"
        return f"heartbeat: no step for {still:.0f} s{most}; " + ("; ".join(behind[:8]) or "no rank differs")


def doing_now(thread: int) -> str:
    """The innermost frame of a thread, as ``file.function``."""
    frame = sys._current_frames().get(thread)
    return "nothing" if frame is None else f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"
