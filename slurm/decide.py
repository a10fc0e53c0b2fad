"""Why a job ended, and what follows: the rules, apart from where the facts come from.

The training processes say in the ledger what they know; Slurm knows of limits, preemption and dead
nodes; the log of srun knows which rank fell first. Standard library only.
"""

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from samba_megatron.platform.exits import ExitCode
from samba_megatron.tracking.ledger import Cause

_KILLED = 128 + 9
_TERMINATED = 128 + 15


class Decision(StrEnum):
    """What happens to the run after a job of it."""

    DONE = "done"
    """Nothing is left to do."""
    STOP = "stop"
    """A person wanted it to end; submitting again goes on."""
    REQUEUE = "requeue"
    """The same job again, or the next one of the chain."""
    HOLD = "hold"
    """Not before a person has looked."""


@dataclass(frozen=True)
class FirstFailure:
    """The task that srun reported first; the others fell because of it."""

    node: str
    tasks: str
    what: str
    """``Exited with exit code 1``, ``Killed``, ``Out Of Memory``, …"""
    last_words: str = ""
    """The last line of its log that says something."""

    @property
    def exit_code(self) -> int | None:
        """Of its own accord; None where it was ended by a signal."""
        found = re.fullmatch(r"Exited with exit code (\d+)", self.what)
        return int(found[1]) if found else None


@dataclass(frozen=True)
class Evidence:
    """All that is known about an end."""

    code: int
    """Exit code of the training step."""
    end: dict[str, Any] | None = None
    """The ledger's ``end`` of this attempt, written by the training processes."""
    job: dict[str, str] = field(default_factory=dict)
    """Slurm's fields of the job."""
    seconds_left: float | None = None
    """Until the job's time limit."""
    is_out_of_time: bool = False
    """The job script ended the ranks, just before the limit."""
    is_ending_early: bool = False
    """Slurm is ending the job, which has time left: somebody called scancel, unless Slurm has a
    reason of its own."""
    signal_lead: float = 0.0
    """Seconds before the limit at which Slurm sends its signal."""
    dead_nodes: dict[str, str] = field(default_factory=dict)
    """Nodes of the job that are down, with their state."""
    first: FirstFailure | None = None
    out_of_memory: str | None = None
    """A line of a log that says so."""


@dataclass(frozen=True)
class Finding:
    """Why, in the ledger's words and in a sentence for people."""

    cause: Cause
    reason: str


def find_cause(evidence: Evidence) -> Finding:
    """The reason of an end. What Slurm did comes before what the ranks saw of it."""
    if evidence.code == ExitCode.DONE:
        return Finding(Cause.DONE, _reason(evidence, "all is done"))
    if evidence.code == ExitCode.REQUEUE:
        return _saved_end(evidence)
    for finding in (_by_slurm(evidence), _by_memory(evidence), _by_ledger(evidence)):
        if finding is not None:
            return finding
    return _by_code(evidence)


def _saved_end(evidence: Evidence) -> Finding:
    """Code 75: asked to stop, and the state is saved. The ranks know who asked, or Slurm does."""
    told = (evidence.end or {}).get("cause")
    if told:
        return Finding(Cause(told), _reason(evidence, "stopped early, saved"))
    by_slurm = _by_slurm(evidence)
    if by_slurm is not None:
        return by_slurm
    if evidence.seconds_left is None:
        return Finding(Cause.TIME_LIMIT, "a signal came; when the job's time ends is not known")
    minutes = evidence.seconds_left / 60
    # Slurm's clock is coarse: its signals come up to a minute early, and saving takes time.
    if evidence.seconds_left <= evidence.signal_lead + 90:
        return Finding(Cause.TIME_LIMIT, f"{minutes:.1f} minutes before the job's time limit")
    reason = f"a signal came {minutes:.0f} minutes before the limit, by Slurm or by hand"
    return Finding(Cause.PREEMPTED, reason)


def _by_slurm(evidence: Evidence) -> Finding | None:
    state = evidence.job.get("JobState", "")
    saved = "saved" if evidence.code == ExitCode.REQUEUE else "not saved"
    if evidence.job.get("PreemptTime", "None") not in ("None", ""):
        return Finding(Cause.PREEMPTED, f"another job took the nodes; the state was {saved}")
    if evidence.dead_nodes:
        names = ", ".join(f"{name} ({state})" for name, state in evidence.dead_nodes.items())
        return Finding(Cause.NODE_FAILURE, f"down or silent: {names}")
    if state == "NODE_FAIL":
        return Finding(Cause.NODE_FAILURE, "Slurm says that a node failed")
    if state == "CANCELLED" or evidence.is_ending_early:
        return Finding(Cause.USER_STOP, f"the job was cancelled; the state was {saved}")
    if evidence.is_out_of_time or state in ("TIMEOUT", "COMPLETING"):
        return Finding(Cause.TIME_LIMIT, f"the job's time was over; the state was {saved}")
    return None


def _by_memory(evidence: Evidence) -> Finding | None:
    """A process that the kernel killed says nothing, and its peers only that it is gone."""
    if evidence.out_of_memory:
        return Finding(Cause.OUT_OF_MEMORY, evidence.out_of_memory)
    first = evidence.first
    if first is None or not any(word in first.what for word in ("Killed", "Out Of Memory")):
        return None
    who = f"task {first.tasks} on {first.node}"
    return Finding(Cause.OUT_OF_MEMORY, f"{who} was killed (signal 9), as for want of memory")


def _by_ledger(evidence: Evidence) -> Finding | None:
    told = (evidence.end or {}).get("cause")
    return Finding(Cause(told), _reason(evidence, f"code {evidence.code}")) if told else None


_OF_CODE = {
    ExitCode.USER_ERROR: Cause.USER_ERROR,
    ExitCode.HOLD: Cause.NON_FINITE,
    ExitCode.BAD_NODE: Cause.BAD_NODE,
    ExitCode.HANG: Cause.HANG,
    _KILLED: Cause.OUT_OF_MEMORY,
    _TERMINATED: Cause.PREEMPTED,
}


def _by_code(evidence: Evidence) -> Finding:
    cause = _OF_CODE.get(evidence.code, Cause.BUG)
    first = evidence.first
    if first is None:
        return Finding(cause, f"exit code {evidence.code}")
    words = f": {first.last_words}" if first.last_words else ""
    return Finding(cause, f"task {first.tasks} on {first.node}: {first.what}{words}")


def _reason(evidence: Evidence, otherwise: str) -> str:
    return str((evidence.end or {}).get("reason") or otherwise)


_DECISIONS = {
    Cause.DONE: Decision.DONE,
    Cause.USER_STOP: Decision.STOP,
    Cause.USER_ERROR: Decision.HOLD,
    Cause.NON_FINITE: Decision.HOLD,
    Cause.CRASH_LOOP: Decision.HOLD,
}


def decide(cause: Cause, code: int, failures: int, limit: int) -> Decision:
    """What follows from an end.

    Args:
        cause: of this end.
        code: exit code of the training step.
        failures: ends in a row without a new checkpoint, this one among them.
        limit: how many of those there may be.
    """
    if code == ExitCode.HOLD:
        return Decision.HOLD
    decision = _DECISIONS.get(cause, Decision.REQUEUE)
    if decision is Decision.REQUEUE and failures >= limit:
        return Decision.HOLD
    return decision
