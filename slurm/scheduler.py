"""What Slurm is asked and told: every call of sbatch, scontrol, squeue, sinfo and scancel.

The commands' answers are read in the forms that are made for programs (``--parsable``, ``-h -o``).
Nothing else in this folder starts a Slurm command, except the templates. Standard library only.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from samba_megatron.platform.errors import UserError

_SECONDS = 60.0
_DEAD = ("down", "fail", "power")
"""Beginnings of the states of a node that runs no job."""


class SlurmError(UserError):
    """Slurm refused something, or did not answer; the message has its words."""


_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True)
class QueuedJob:
    """One line of squeue."""

    id: int
    state: str
    """PENDING, RUNNING, …"""
    reason: str
    """Why it waits."""
    start: str
    """When it started, or when Slurm expects to start it; ``N/A`` if it does not know."""
    time_left: str


def is_here() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None


def ask(*command: str) -> str:
    """Runs a Slurm command and returns what it printed.

    Raises:
        SlurmError: it is not on this machine, does not answer, or refuses.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except FileNotFoundError:
        raise SlurmError(
            f"there is no {command[0]} on this machine: run this where Slurm's commands are "
            "(a login node), or with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within {_SECONDS:.0f} s") from None
    if result.returncode:
        said = " ".join((result.stderr or result.stdout).split())
        raise SlurmError(f"{command[0]}: {said or f'exit code {result.returncode}'}")
    return result.stdout


def submit(script: str) -> int:
    """Submits a job script; returns the job's id."""
    return int(ask("sbatch", "--parsable", script).strip().partition(";")[0])


def test(script: str) -> str:
    """What sbatch says of a job that is not submitted: when and where it would start.

    Raises:
        SlurmError: it could not run on this cluster; one sentence with the remedy.
    """
    try:
        result = subprocess.run(
            ["sbatch", "--test-only", script], capture_output=True, text=True, timeout=_SECONDS
        )
    except FileNotFoundError:
        ask("sbatch")  # says it
        raise
    said = " ".join(re.sub(r"(sbatch: )|(error: )", "", result.stderr).split())
    if result.returncode:
        raise SlurmError(f"this cluster would refuse the job: {said}{_remedy(said)}")
    return said


def _remedy(said: str) -> str:
    """What to do about a refusal, where its words leave it open."""
    for words, remedy in (
        ("nvalid partition", f": give --partition one of {', '.join(partitions())}"),
        ("nvalid account", ": check --account (sacctmgr show associations lists yours)"),
        ("nvalid qos", ": check --qos (sacctmgr show qos lists them)"),
        ("eservation", ": check --reservation (scontrol show reservation lists them)"),
        ("time limit", ": check --time (sinfo -o '%P %l' lists the partitions' limits)"),
        ("odes required for job", "; sinfo -R lists nodes that are down, and why"),
        ("ode configuration", ": check --nodes and --gpus-per-node (sinfo -o '%P %D %G')"),
        ("ode count", ": check --nodes (sinfo -o '%P %D')"),
    ):
        if words in said:
            return remedy
    return ""


def partitions() -> list[str]:
    """The partitions of this cluster."""
    return [name.rstrip("*") for name in ask("sinfo", "-h", "-o", "%P").split()]


def resources_of_nodes(partition: str | None) -> set[str]:
    """The generic resources (``gpu:8``) that nodes of a partition have, each once."""
    chosen = ["-p", partition] if partition else []
    return set(ask("sinfo", "-h", "-o", "%G", *chosen).splitlines())


def setting(name: str) -> str:
    """A value of ``scontrol show config``; empty if it has none."""
    for line in ask("scontrol", "show", "config").splitlines():
        key, _, value = line.partition("=")
        if key.strip() == name:
            return "" if value.strip() == "(null)" else value.strip()
    return ""


def seconds(time: str) -> int | None:
    """Slurm's ways to write a duration: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS.

    None for anything else, ``UNLIMITED`` among it.
    """
    match = _TIME.fullmatch(time.strip())
    if match is None:
        return None
    days, *parts = match.groups()
    first, second, third = (int(part or 0) for part in parts)
    if days is not None:
        return ((int(days) * 24 + first) * 60 + second) * 60 + third
    if parts[2] is not None:
        return (first * 60 + second) * 60 + third
    return first * 60 + second


def job(job_id: int) -> dict[str, str] | None:
    """The fields of ``scontrol show job``; None if Slurm does not know the job (any more)."""
    try:
        text = ask("scontrol", "show", "job", "-o", str(job_id))
    except SlurmError:
        return None
    return dict(re.findall(r"(\S+?)=(\S*)", text))


def queued(name: str) -> list[QueuedJob]:
    """This user's jobs of a name that wait or run, oldest first."""
    lines = ask("squeue", "-h", "--me", "-n", name, "-o", "%i|%T|%r|%S|%L").splitlines()
    jobs = [line.split("|") for line in lines if line.count("|") == 4]
    found = [QueuedJob(int(first), *rest) for first, *rest in jobs if first.isdigit()]
    return sorted(found, key=lambda queued_job: queued_job.id)


def hostnames(nodelist: str) -> list[str]:
    """``n[1-2]`` as names."""
    return ask("scontrol", "show", "hostnames", nodelist).split() if nodelist else []


def leaf_switches() -> dict[str, str]:
    """Each node's leaf switch, where the cluster's topology is known to Slurm; else empty."""
    try:
        text = ask("scontrol", "show", "topology")
    except SlurmError:
        return {}
    leaves = re.findall(r"SwitchName=(\S+) Level=0 .*?Nodes=(\S+)", text)
    return {node: leaf for leaf, nodes in leaves for node in hostnames(nodes)}


def dead_nodes(names: Sequence[str]) -> dict[str, str]:
    """Those of the nodes that are down or silent, with their state; none if Slurm does not say."""
    if not names:
        return {}
    try:
        text = ask("sinfo", "-h", "-N", "-n", ",".join(names), "-o", "%N %t")
    except SlurmError:
        return {}
    states = dict(line.split() for line in text.splitlines())
    return {
        name: state
        for name, state in states.items()
        if state.startswith(_DEAD) or state.endswith("*")
    }


def requeue(job_id: int, exclude: Sequence[str]) -> None:
    """Ends a running job and puts it back into the queue, where it keeps off some nodes.

    The caller must ignore SIGTERM: the first of the two calls ends the job's own script.
    """
    ask("scontrol", "requeue", str(job_id))
    if exclude:
        keep_off(job_id, exclude)


def keep_off(job_id: int, exclude: Sequence[str]) -> None:
    """Excludes nodes from a waiting job. The list replaces the one before."""
    ask("scontrol", "update", f"jobid={job_id}", f"ExcNodeList={','.join(exclude)}")


def hold(job_id: int) -> None:
    """Keeps a waiting job from starting until somebody calls ``scontrol release``."""
    ask("scontrol", "hold", str(job_id))


def cancel(job_id: int) -> None:
    """Takes a job out of the queue."""
    ask("scancel", str(job_id))
