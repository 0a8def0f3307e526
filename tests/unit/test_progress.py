"""Progress bars in processes that may be killed."""

import threading

from tqdm import tqdm

from treg_megatron.utils.progress import Progress


def test_a_lock_that_a_killed_process_still_holds_stops_no_bar(monkeypatch):
    held = threading.Lock()
    held.acquire()  # as a forked process finds it that shares the lock with one that was killed
    monkeypatch.setattr(tqdm, "_lock", held, raising=False)

    def work():
        with Progress("step", "pairs", 1) as progress:
            progress.skipped(1)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(10)
    assert not worker.is_alive()
