"""A private Slurm on this machine: its own key, ports and folder; simulated nodes; torn down by id.

One munged, one slurmctld and, for :class:`Cluster`, one slurmd for each simulated node: real jobs
run on it. :class:`ControllerOnly` has no slurmd: ``sbatch --test-only`` answers there for thousands
of nodes that this machine could not start. Neither needs systemd, cgroups or a data base.
"""

import contextlib
import getpass
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])

_COMMON = """
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket{expire}
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
StateSaveLocation={folder}/state
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,bf_resolution=1
PriorityType=priority/basic
GresTypes=gpu
ReturnToService=2
MessageTimeout=60
TCPTimeout=20
MailProg=/bin/true
"""

# Two partitions of the same nodes: jobs of the urgent one take them from jobs of the main one.
_NODES = """
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdSpoolDir={folder}/spool/%n
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobs.txt
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=30
MinJobAge=3600
SlurmdTimeout=30
SlurmctldTimeout=10
{requeue_exit}
FirstJobId={first_job}
SrunPortRange={first_srun}-{last_srun}
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
NodeName=DEFAULT CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 \
RealMemory=4000 Gres=gpu:{gpus} State=UNKNOWN
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first_node}-{last_node}]
PartitionName=DEFAULT Nodes=ALL State=UP OverSubscribe=NO
PartitionName=main Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent MaxTime=INFINITE PriorityTier=100 PreemptMode=OFF
"""

_PAPER_NODES = """
TopologyPlugin=topology/tree
ResumeProgram=/bin/true
SuspendProgram=/bin/true
SuspendTime=60
ResumeTimeout=3600
NodeName=n[1-{nodes}] State=CLOUD CPUs=128 Boards=1 SocketsPerBoard=2 CoresPerSocket=64 \
ThreadsPerCore=1 RealMemory=2000000 Gres=gpu:{gpus}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class _Slurm:
    """munged and slurmctld in a folder of their own, which goes with them."""

    def __init__(self) -> None:
        # munged wants a folder that everybody may enter, and its socket a short path.
        self.folder = Path(tempfile.mkdtemp(prefix="private-slurm-"))
        self.folder.chmod(0o755)
        for name in ("etc", "run", "log", "state", "spool"):
            (self.folder / name).mkdir()
        self.configuration = self.folder / "etc" / "slurm.conf"
        self._ports = _Ports()
        # Our own jobs must not be taken for steps of a job that the tests may run in.
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        self.env |= {"SLURM_CONF": str(self.configuration), "PATH": SBIN}

    def run(self, *command: str, check: bool = True, timeout: float = 120) -> str:
        """Runs a Slurm command against this cluster; returns what it printed."""
        result = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=timeout
        )
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stdout}{result.stderr}")
        return result.stdout + result.stderr

    def _start_controller(self) -> None:
        key = self.folder / "etc" / "munge.key"
        if not key.exists():
            key.touch(0o600)
            key.write_bytes(os.urandom(128))
        munged = ["munged", f"--key-file={key}", "--num-threads=2"]
        files = {"socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munged.seed"}
        munged += [f"--{option}={self.folder}/run/{file}" for option, file in files.items()]
        self.run(*munged, f"--log-file={self.folder}/log/munged.log")
        self.run("slurmctld", "-f", str(self.configuration))
        self._wait(lambda: "UP" in self.run("scontrol", "ping", check=False), 120, "slurmctld")

    def _wait(self, ready: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what} is not there after {seconds:.0f} s:\n{self.report()}")
            time.sleep(0.1)

    def report(self) -> str:
        """The ends of the daemons' logs, for an error."""
        logs = sorted((self.folder / "log").glob("*.log"))
        return "\n".join(f"--- {log.name}\n{log.read_text()[-1500:]}" for log in logs)

    def stop(self) -> None:
        """Ends all jobs, then every process that has one of this cluster's logs open."""
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            self.run("scancel", "--full", f"--user={getpass.getuser()}", timeout=10)
        for process in {p for pid in self._daemons("*") for p in _family(pid)}:
            _kill(process)
        deadline = time.monotonic() + 10
        while self._daemons("*") and time.monotonic() < deadline:
            time.sleep(0.05)
        self._ports.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _daemons(self, log: str) -> set[int]:
        """Processes that have a log of this cluster open: daemons and their job step daemons."""
        return set(_holders(self.folder / "log", log))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Cluster(_Slurm):
    """Simulated nodes n1, n2, … that run real jobs; each says that it has two GPUs.

    Args:
        nodes: how many.
        requeue_exit: whether the site requeues code 75 and holds code 76 by itself.
    """

    def __init__(self, nodes: int = 4, requeue_exit: bool = True) -> None:
        super().__init__()
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]
        port, gpus = self._ports.first, 2
        values = {
            "name": "private",
            "host": socket.gethostname().split(".")[0],
            "user": getpass.getuser(),
            "folder": self.folder,
            "port": port,
            # How long Slurm waits before it starts a requeued job anew follows from this.
            "expire": ",cred_expire=5",
            # Jobs take their rendezvous port from their id: two clusters' must not have the same.
            "first_job": random.SystemRandom().randrange(1, 500_000),
            "cpus": 8,
            "gpus": gpus,
            "nodes": nodes,
            "first_node": port + 1,
            "last_node": port + nodes,
            "first_srun": port + nodes + 1,
            "last_srun": port + nodes + 60,
            "requeue_exit": "RequeueExit=75\nRequeueExitHold=76" if requeue_exit else "",
        }
        self.configuration.write_text((_COMMON + _NODES).format(**values))
        devices = [self._device(number) for number in range(gpus)]
        lines = [f"Name=gpu File={device}\n" for device in devices]
        (self.folder / "etc" / "gres.conf").write_text("".join(lines))

    def _device(self, number: int) -> Path:
        """A character device: for anything else Slurm sets no CUDA_VISIBLE_DEVICES."""
        path = self.folder / "run" / f"gpu{number}"
        try:
            os.mknod(path, 0o20666, os.makedev(1, 3))
        except PermissionError:
            return Path(("/dev/null", "/dev/zero")[number])
        return path

    def start(self) -> Self:
        """Starts the daemons and waits until all nodes are idle."""
        try:
            self._need_an_address()
            self._start_controller()
            for node in self.nodes:
                self.start_node(node)
            self._wait(lambda: self.count("idle") == len(self.nodes), 120, "a node")
        except BaseException:
            self.stop()
            raise
        return self

    def _need_an_address(self) -> None:
        """slurmd wants an IPv4 address other than 127.*, which a machine without network lacks."""
        if not re.search(r"inet (?!127\.)", self.run("ip", "-4", "-o", "addr")):
            self.run("ip", "addr", "add", "10.255.255.1/32", "dev", "lo")

    def count(self, state: str) -> int:
        """Nodes in a state."""
        lines = self.run("sinfo", "-h", "-p", "main", "-t", state, "-o", "%D", check=False)
        return sum(int(line) for line in lines.split() if line.isdigit())

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd."""
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self.run("slurmd", "-N", node, "-f", str(self.configuration))

    def kill_node(self, node: str) -> None:
        """As if it lost power: its daemons and every process below them get SIGKILL."""
        for process in {p for pid in self._daemons(f"slurmd.{node}.log") for p in _family(pid)}:
            _kill(process)

    def job_processes(self, job: int, rank: int | None = None) -> list[int]:
        """Processes of a job's training step (of one rank), found by their environment."""
        return [
            pid
            for pid, variables in _environments()
            if variables.get("SLURM_JOB_ID") == str(job)
            and "RANK" in variables
            and (rank is None or variables["RANK"] == str(rank))
        ]


class ControllerOnly(_Slurm):
    """As many nodes as wanted on paper, under a tree of switches; nothing can run on them.

    Args:
        nodes: how many.
        gpus: of each.
        leaf: nodes under one leaf switch.
    """

    def __init__(self, nodes: int = 1024, gpus: int = 8, leaf: int = 32) -> None:
        super().__init__()
        values = {
            "name": "paper",
            "host": socket.gethostname().split(".")[0],
            "user": getpass.getuser(),
            "folder": self.folder,
            "port": self._ports.first,
            "expire": "",
            "nodes": nodes,
            "gpus": gpus,
        }
        self.configuration.write_text((_COMMON + _PAPER_NODES).format(**values))
        etc = self.folder / "etc"
        (etc / "gres.conf").write_text(f"NodeName=n[1-{nodes}] Name=gpu Count={gpus}\n")
        (etc / "topology.conf").write_text(topology(nodes, leaf))

    def start(self) -> Self:
        """Starts the controller."""
        try:
            self._start_controller()
        except BaseException:
            self.stop()
            raise
        return self


def topology(nodes: int, leaf: int) -> str:
    """``topology.conf`` of nodes n1, n2, … with ``leaf`` of them under each leaf switch."""
    leaves = range((nodes + leaf - 1) // leaf)
    lines = [
        f"SwitchName=leaf{i + 1} Nodes=n[{i * leaf + 1}-{min(nodes, (i + 1) * leaf)}]"
        for i in leaves
    ]
    return "\n".join([*lines, f"SwitchName=core Switches=leaf[1-{len(leaves)}]"]) + "\n"


def missing_commands(commands: Sequence[str] = ("munged", "slurmctld", "slurmd")) -> list[str]:
    """Those of Slurm's commands that this machine lacks."""
    return [command for command in commands if shutil.which(command, path=SBIN) is None]


class _Ports:
    """A range of free ports that no other private cluster of this machine takes.

    Below those that the kernel gives to whoever asks. A socket with a name stands for each range:
    it can be bound once, and is free again when its process has ended.
    """

    size = 80

    def __init__(self) -> None:
        for first in range(30100, 32700 - self.size, self.size):
            self.first = first
            self._mark = socket.socket(socket.AF_UNIX)
            try:
                self._mark.bind(f"\0private-slurm-{self.first}")
            except OSError:
                self._mark.close()
                continue
            if self._are_free():
                return
            self._mark.close()
        raise RuntimeError("no range of ports is free")

    def _are_free(self) -> bool:
        with contextlib.ExitStack() as stack:
            try:
                for port in range(self.first, self.first + self.size):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                return False
        return True

    def release(self) -> None:
        """Lets others have them."""
        self._mark.close()


def _holders(folder: Path, pattern: str) -> Iterator[int]:
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            for descriptor in os.scandir(descriptors):
                target = Path(os.readlink(descriptor.path))
                if target.parent == folder and target.match(pattern):
                    yield int(descriptors.parent.name)
                    break


def _family(pid: int) -> list[int]:
    """A process and all below it."""
    found, new = [pid], [pid]
    while new:
        children = []
        for parent in new:
            for listing in Path(f"/proc/{parent}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    children += [int(child) for child in listing.read_text().split()]
        found, new = found + children, children
    return found


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _environments() -> Iterator[tuple[int, dict[str, str]]]:
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            pairs = (entry.partition("=") for entry in path.read_text().split("\0"))
            yield int(path.parent.name), {name: value for name, _, value in pairs}
