"""One writer per output: a lock file that names its holder, for file systems where ``flock`` reaches one node only.

The lock of ``runs/x`` is the file ``runs/.x.lock``. It appears as a hard link to a file that is already written, which
NFS and Lustre do atomically, and its holder touches it every :data:`BEAT_SECONDS`. A lock that is found is taken over
only when its holder is provably gone: its process on this machine has ended, Slurm no longer runs its job, or it has
not been touched for :data:`STALE_SECONDS`. A holder that was only silent finds out by :meth:`Lock.require_held`.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from treg_megatron.errors import UserError

logger = logging.getLogger(__name__)

BEAT_SECONDS = 15.0
STALE_SECONDS = 180.0  # many beats, and longer than NFS caches a file's time (60 s by default)
SCONTROL_SECONDS = 30

# Slurm's states of a job none of whose processes runs. PENDING: it was requeued.
_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PENDING",
    "PREEMPTED",
    "TIMEOUT",
}
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)


class Held(UserError):
    """Another process holds a lock, and is alive."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock: the content of the lock file.

    Attributes:
        token: identifies the acquisition.
        boot, pid_namespace: where ``pid`` means something.
        started: of the process, in clock ticks after boot, because pids are used again; None where it is not known.
        cluster, job, restart, job_name: of Slurm; empty outside of it.
        since: local time of the node.
    """

    token: str
    node: str
    boot: str
    pid_namespace: str
    user: int
    pid: int
    started: int | None
    cluster: str
    job: str
    restart: str
    job_name: str
    since: str

    def __str__(self) -> str:
        job = f"job {self.job}{f' ({self.job_name})' if self.job_name else ''}, " if self.job else ""
        return f"{job}process {self.pid} on {self.node}, since {self.since}"


class Lock:
    """The right to write one output, held by one process.

    Args:
        output: the file or folder to write; it need not exist.
    """

    def __init__(self, output: str | Path):
        self.output = Path(output)
        self.path = self.output.with_name(f".{self.output.name}.lock")
        self._holder: Holder | None = None
        self._stop = threading.Event()
        self._new_folders: list[Path] = []

    def acquire(self, watch: bool = True) -> None:
        """Take the lock, or take it over from a holder that is gone.

        Args:
            watch: watch a holder for signs of life, for up to :data:`STALE_SECONDS`, if nothing else tells whether it
                is gone; otherwise take it for alive.

        Raises:
            Held: another process holds it.
            UserError: the folder cannot be written.
        """
        holder = _this_process()
        candidate = self.path.with_name(f"{self.path.name}.{_name_of(holder)}")
        try:
            self._write(candidate, holder)
            try:
                while not (_link(candidate, self.path) or self._take_over(candidate, watch)):
                    pass
            finally:
                candidate.unlink(missing_ok=True)
        except OSError as error:
            self._remove_empty_folders()
            reason = "a folder above it is a file" if isinstance(error, FileExistsError) else error.strerror or error
            raise UserError(f"cannot write {self.output}: {reason}") from None
        for path in self.path.parent.glob(f"{self.path.name}.*"):  # candidates of processes that were killed
            _remove_abandoned(path)
        self._holder = holder
        self._stop = threading.Event()
        threading.Thread(target=self._beat, args=(holder, self._stop), daemon=True).start()

    def release(self) -> None:
        """Give the lock back, if this process holds it."""
        holder, self._holder = self._holder, None
        if holder is None or holder.pid != os.getpid():
            return
        self._stop.set()
        with contextlib.suppress(OSError):
            if _read(self.path) == holder:
                self.path.unlink()
        self._remove_empty_folders()

    def is_held(self) -> bool:
        """Whether the lock is still this process's own."""
        return self._holder is not None and self._found() == self._holder

    def require_held(self) -> None:
        """Check :meth:`is_held`; call it before anything is declared finished.

        Raises:
            UserError: another process took the lock over, or its file was removed.
        """
        if not self.is_held():
            raise UserError(
                f"{self.output} now belongs to {self._found() or 'nobody: its lock file was removed'}; "
                "this process stops, so as not to write over it"
            )

    def __deepcopy__(self, _memo: dict) -> "Lock":
        return self  # NeMo copies a trainer's callbacks and their attributes

    def __enter__(self) -> "Lock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _write(self, candidate: Path, holder: Holder) -> None:
        for attempt in range(3):
            with contextlib.suppress(*([] if attempt == 2 else [FileNotFoundError])):
                self._new_folders = [folder for folder in self.path.parents if not folder.exists()]
                self.path.parent.mkdir(parents=True, exist_ok=True)
                candidate.write_text(json.dumps(dataclasses.asdict(holder)), encoding="utf-8")
                return  # otherwise another process has just removed the folders that it had made for its lock

    def _remove_empty_folders(self) -> None:
        """Remove the folders that were made for the lock, if nothing was written into them."""
        with contextlib.suppress(OSError):
            for folder in self._new_folders:
                folder.rmdir()

    def _found(self) -> Holder | None:
        with contextlib.suppress(FileNotFoundError):
            return _read(self.path)
        return None

    def _take_over(self, candidate: Path, watch: bool) -> bool:
        """Replace the lock of a holder that is gone; False if there is nothing left to replace."""
        try:
            found = _read(self.path)
        except FileNotFoundError:
            return False
        why = self._why_gone(found, candidate, watch)
        if why is None:
            raise Held(
                f"{self.output} is being written by {found or 'another process'}: wait for it, stop it, "
                f"or choose another output (lock file: {self.path})"
            )
        guard = Lock(self.output)  # several processes may have seen it gone: one of them replaces it
        guard.path = self.path.with_name(f"{self.path.name}.takeover")
        with guard:
            try:
                if _read(self.path) != found:
                    return False
            except FileNotFoundError:
                return False
            logger.warning("%s: taking over from %s: %s", self.output, found or "an unknown process", why)
            os.replace(candidate, self.path)
        return True

    def _why_gone(self, holder: Holder | None, candidate: Path, watch: bool) -> str | None:
        """The proof that the holder is gone, in a few words; None if it is alive."""
        if holder is not None:
            if _is_on_this_machine(holder):
                return None if _is_running(holder) else "its process has ended"
            if slurm := _why_gone_from_slurm(holder):
                return slurm
        if not watch:
            return None
        first_beat = self.path.stat().st_mtime_ns
        watched = False
        while True:
            # the file system's clock: the nodes' clocks may differ
            os.utime(candidate)
            silent = (candidate.stat().st_mtime_ns - first_beat) / 1e9
            if silent > STALE_SECONDS:
                return f"it has been silent for {silent:.0f} s"
            if not watched:
                logger.info("%s is locked by %s; waiting for a sign of life", self.output, holder or "another process")
                watched = True
            time.sleep(min(1.0, BEAT_SECONDS / 4))
            try:
                _read(self.path)  # opening the file makes NFS ask the server for its time
                if self.path.stat().st_mtime_ns != first_beat:
                    return None
            except FileNotFoundError:
                return "it has just finished"

    def _beat(self, holder: Holder, stop: threading.Event) -> None:
        while not stop.wait(BEAT_SECONDS):
            try:
                if _read(self.path) != holder:
                    return  # require_held says so
                os.utime(self.path)
            except FileNotFoundError:
                return
            except OSError as error:  # a file server that restarts; try again
                logger.debug("%s: %s", self.path, error)


def remove_abandoned_locks(folder: Path) -> None:
    """Remove the locks below a folder that processes left behind that are known to have ended."""
    for path in folder.glob(".*.lock.*"):  # of processes that were killed while they took the lock
        _remove_abandoned(path)
    for path in folder.glob(".*.lock"):
        with contextlib.suppress(UserError):
            lock = Lock(folder / path.name[1 : -len(".lock")])
            lock.acquire(watch=False)
            lock.release()


def _link(candidate: Path, path: Path) -> bool:
    """Create the lock file from ``candidate``; False if there is one."""
    try:
        os.link(candidate, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    try:  # a file system without hard links
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with open(handle, "wb") as file:
        file.write(candidate.read_bytes())
    return True


def _name_of(holder: Holder) -> str:
    """What a candidate is called after: its process, which may be killed before it has written anything into it."""
    return f"{_machine(holder.boot, holder.pid_namespace)}-{holder.pid}-{holder.started}-{holder.token}"


def _machine(boot: str, pid_namespace: str) -> str:
    """Short name of the place where a pid means something."""
    return hashlib.sha256(f"{boot} {pid_namespace}".encode()).hexdigest()[:8]


def _remove_abandoned(candidate: Path) -> None:
    with contextlib.suppress(OSError):
        here = _this_process()
        owner = re.search(r"\.([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{32}$", candidate.name)
        holder = _read(candidate)
        if holder is not None and _is_on_this_machine(holder):
            abandoned = not _is_running(holder)
        elif owner and owner[1] == _machine(here.boot, here.pid_namespace):
            abandoned = _start_time(int(owner[2])) != int(owner[3])
        else:
            abandoned = time.time() - candidate.stat().st_mtime > STALE_SECONDS
        if abandoned:
            candidate.unlink()


def _read(path: Path) -> Holder | None:
    """The holder in a lock file, or None if it cannot be made out."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None


def _this_process() -> Holder:
    variables = os.environ
    return Holder(
        token=uuid.uuid4().hex,
        node=variables.get("SLURMD_NODENAME") or socket.gethostname(),
        boot=_first_line("/proc/sys/kernel/random/boot_id"),
        pid_namespace=_link_target("/proc/self/ns/pid"),
        user=os.getuid(),
        pid=os.getpid(),
        started=_start_time(os.getpid()),
        cluster=variables.get("SLURM_CLUSTER_NAME", ""),
        job=variables.get("SLURM_JOB_ID", ""),
        restart=variables.get("SLURM_RESTART_COUNT", "0"),
        job_name=variables.get("SLURM_JOB_NAME", ""),
        since=time.strftime("%F %T"),
    )


def _is_on_this_machine(holder: Holder) -> bool:
    """Whether the holder's pid means something to this process."""
    here = _this_process()
    return (here.boot, here.pid_namespace) == (holder.boot, holder.pid_namespace)


def _is_running(holder: Holder) -> bool:
    """Whether a process of this machine still runs."""
    if holder.started is not None:
        return _start_time(holder.pid) == holder.started
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _start_time(pid: int) -> int | None:
    """When a process started, in clock ticks after boot; None if it has ended, or without /proc."""
    try:
        # after the command's name, which may hold anything: state, ..., and the start time as the 22nd field
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _why_gone_from_slurm(holder: Holder) -> str | None:
    """The proof from Slurm that the holder is gone, or None."""
    here = _this_process()
    # a site may hide the jobs of others, which then look unknown
    if not holder.job or (holder.cluster, holder.user) != (here.cluster, here.user):
        return None
    if here.job == holder.job and here.restart != holder.restart:
        return f"job {holder.job} has been requeued since"
    try:
        shown = subprocess.run(
            ["scontrol", "show", "job", "--oneliner", holder.job],
            capture_output=True,
            text=True,
            timeout=SCONTROL_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if "Invalid job id" in shown.stderr:  # it ended so long ago that Slurm has forgotten it
        return f"Slurm no longer knows job {holder.job}"
    state = re.search(r"\bJobState=(\w+)", shown.stdout)
    return f"job {holder.job} is {state[1]}" if state and state[1] in _ENDED else None


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return socket.gethostname()


def _link_target(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
