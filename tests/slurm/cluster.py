"""A real Slurm on one machine: slurmctld, munge, and nodes that pose as hosts of eight H100.

Each node is a slurmd in its own mount, UTS and process namespaces: it has its own host name, a killed node takes all
its processes with it as a power cut does, and a folder can be hidden from one node alone. Needs root and Debian's
packages slurmctld, slurmd, slurm-client, munge.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare", "nsenter", "setpriv")

SLURM_CONF = """\
ClusterName=mini
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={d}/run/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
EnforcePartLimits=ALL
StateSaveLocation={d}/state
SlurmdSpoolDir={d}/spool/%n
SlurmctldPidFile={d}/run/slurmctld.pid
SlurmdPidFile={d}/run/slurmd.%n.pid
SlurmctldLogFile={d}/log/slurmctld.log
SlurmdLogFile={d}/log/slurmd.%n.log
ReturnToService=2
SlurmdTimeout=10
InactiveLimit=0
MinJobAge=600
KillWait=10
JobRequeue=1
MailProg=/bin/true
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
GresTypes=gpu
PlugStackConfig={d}/etc/plugstack.conf
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeHostname=localhost NodeAddr={address} Port={port} CPUs=192 RealMemory=2000000 "
    "Gres=gpu:h100:8 State=UNKNOWN"
)
START_SECONDS = 60
SMALL_DISK = "5m"  # room for one checkpoint of the tests' model, and not for two


class Cluster:
    """The daemons, started by the constructor and ended by :meth:`down`.

    Args:
        nodes: how many; their names are node1, node2, ... All see ``small_disk``, which is soon full.
        environment: of every job.
    """

    def __init__(self, nodes: int, environment: dict[str, str]):
        # a short path that everyone may enter: sockets have at most 108 characters, and munge asks for it
        self.folder = Path(tempfile.mkdtemp(prefix="sl-", dir="/tmp"))
        self.folder.chmod(0o755)
        self.names = [f"node{i}" for i in range(1, nodes + 1)]
        self.environment = {**environment, "SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}
        self._ports = _free_ports(nodes + 1)
        self._write_files()
        self.small_disk = self.folder / "small"
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "none", self.small_disk], check=True)
        self.munge = self._daemon(
            "munged",
            "--foreground",
            "--key-file",
            self._path("etc/munge.key"),
            "--socket",
            self._path("run/munge.sock"),
            "--pid-file",
            self._path("run/munged.pid"),
            "--log-file",
            self._path("log/munged.log"),
            "--seed-file",
            self._path("run/munge.seed"),
        )
        _wait(lambda: (self.folder / "run" / "munge.sock").exists(), "munge")
        self.start_controller()
        self.nodes: dict[str, subprocess.Popen] = {}
        for name in self.names:
            self.start_node(name)
        _wait(lambda: self.states() == {"idle"}, "all nodes idle")

    def down(self) -> None:
        for node in self.nodes.values():
            node.kill()
        for daemon in (self.controller, self.munge):
            daemon.terminate()
        for process in (*self.nodes.values(), self.controller, self.munge):
            process.wait()
        subprocess.run(["umount", self.small_disk], check=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- daemons

    def start_controller(self) -> None:
        self.controller = self._daemon("slurmctld", "-D")
        _wait(
            lambda: subprocess.run(["scontrol", "ping"], env=self.environment, capture_output=True).returncode == 0,
            "slurmctld",
        )

    def restart_controller(self) -> None:
        self.controller.terminate()
        self.controller.wait()
        self.start_controller()

    def start_node(self, name: str) -> None:
        self.nodes[name] = self._daemon(
            "unshare",
            "--mount",
            "--uts",
            "--pid",
            "--fork",
            "--kill-child=SIGKILL",
            "--mount-proc",
            "--propagation",
            "private",
            "sh",
            "-c",
            f"mount --bind {self._path('etc/hosts')} /etc/hosts; hostname {name}; slurmd -D -N {name} & wait $!",
        )

    def power_off(self, name: str) -> None:
        """Every process of a node ends at once; then the controller is told, which would find out by itself in 25 s."""
        self.nodes[name].kill()
        self.nodes[name].wait()
        self.run("scontrol", "update", f"nodename={name}", "state=down", "reason=power")

    def power_on(self, name: str) -> None:
        self.start_node(name)
        self.run("scontrol", "update", f"nodename={name}", "state=resume", check=False)
        _wait(lambda: self.states() == {"idle"}, f"{name} idle")

    def inside(self, name: str, *command: str) -> None:
        """Run a command in a node's namespaces."""
        child = Path(f"/proc/{self.nodes[name].pid}/task/{self.nodes[name].pid}/children").read_text().split()[0]
        subprocess.run(["nsenter", "--target", child, "--mount", "--uts", "--pid", *command], check=True)

    # -- jobs

    def run(self, *command: str | Path, check: bool = True, cwd: Path | None = None, **variables: str) -> str:
        result = subprocess.run(
            list(map(str, command)), env=self.environment | variables, cwd=cwd, text=True, capture_output=True
        )
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def submit(self, script: Path, *arguments: str, cwd: Path, **variables: str) -> str:
        """Submit a script as a user would, from ``cwd``; the job's id."""
        return self.run("sbatch", "--parsable", script, *arguments, cwd=cwd, **variables)

    def state(self, job: str) -> str:
        shown = self.run("scontrol", "show", "job", "--oneliner", job, check=False)
        return shown.split("JobState=")[1].split()[0] if "JobState=" in shown else "GONE"

    def field(self, job: str, name: str) -> str:
        return self.run("scontrol", "show", "job", "--oneliner", job).split(f" {name}=")[1].split()[0]

    def wait(self, job: str, *states: str, seconds: float = 420) -> str:
        """Until a job is in one of ``states``."""
        ended = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE"}

        def there() -> bool:
            state = self.state(job)
            assert state in states or state not in ended, f"job {job} is {state}, not {states}"
            return state in states

        _wait(there, f"job {job} in {states}", seconds)
        return self.state(job)

    def states(self) -> set[str]:
        return set(self.run("sinfo", "-hN", "-o", "%t").split())

    def clear(self) -> None:
        """No jobs, all nodes idle."""
        if jobs := self.run("squeue", "-h", "-o", "%i").split():
            self.run("scancel", *jobs, check=False)
        _wait(lambda: not self.run("squeue", "-h", "-o", "%i"), "an empty queue")
        for name in self.names:
            if self.nodes[name].poll() is not None:
                self.power_on(name)
        _wait(lambda: self.states() == {"idle"}, "all nodes idle")

    def processes(self, *words: str) -> list[int]:
        """Processes of jobs, as this machine numbers them, whose command line has all ``words``."""
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if (
                    all(word in line for word in words)
                    and f"SLURM_CONF={self.environment['SLURM_CONF']}" in (folder / "environ").read_bytes().decode()
                ):
                    found.append(int(folder.name))
        return found

    # -- inside

    def _write_files(self) -> None:
        for name in ("etc", "run", "log", "state", "dev", "small", *(f"spool/{name}" for name in self.names)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "etc" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        addresses = {name: f"127.0.1.{i}" for i, name in enumerate(self.names, 1)}
        (self.folder / "etc" / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in addresses.items())
        )
        for i in range(8):  # any character device will do: no program opens it
            os.mknod(self.folder / "dev" / f"nvidia{i}", 0o666 | 0o020000, os.makedev(1, 3))
        (self.folder / "etc" / "gres.conf").write_text(f"Name=gpu Type=h100 File={self.folder}/dev/nvidia[0-7]\n")
        (self.folder / "etc" / "plugstack.conf").touch()
        (self.folder / "etc" / "slurm.conf").write_text(
            SLURM_CONF.format(
                d=self.folder,
                controller_port=self._ports[0],
                nodes="\n".join(
                    NODE.format(name=name, address=addresses[name], port=port)
                    for name, port in zip(self.names, self._ports[1:], strict=True)
                ),
            )
        )

    def _daemon(self, *command: str) -> subprocess.Popen:
        # if the tests are killed, the kernel ends the daemons, and they their nodes
        log = open(self.folder / "log" / "daemons.log", "ab")
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *command],
            env=self.environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _path(self, name: str) -> str:
        return str(self.folder / name)


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]


def _wait(condition, what: str, seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]
