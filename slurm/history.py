"""What the jobs of a run have done so far, read from the run's ledger (``run.jsonl``).

The job script writes ``job_start`` and ``job_end``; a job that has the first without the second
was gone before it could say anything. Nodes that failed their check are in ``bad_nodes``.
Standard library only.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samba_megatron.checkpoint.folder import checkpoint_step, read_latest
from samba_megatron.tracking import ledger
from samba_megatron.tracking.ledger import Cause

PATIENT_CAUSES = {Cause.DONE, Cause.PREEMPTED, Cause.USER_STOP}
"""Ends that say nothing against starting again, with or without a new checkpoint."""


@dataclass
class Attempt:
    """One start of the run: a job, or one of its restarts."""

    job: int
    restart: int
    nodes: list[str]
    started: float
    """Seconds since 1970."""
    first_checkpoint: int
    """Step of the newest checkpoint at the start; -1 for none."""
    last_checkpoint: int | None = None
    """The same at the end; None while it runs."""
    ended: float | None = None
    cause: str | None = None
    decision: str | None = None
    reason: str = ""

    @property
    def has_progress(self) -> bool:
        """Whether it left a newer checkpoint than it found."""
        return (self.last_checkpoint or -1) > self.first_checkpoint


def this_attempt() -> tuple[int, int]:
    """(job id, restart count) of the Slurm job that this process belongs to."""
    return int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def attempts(run_dir: Path) -> list[Attempt]:
    """All starts of the run, oldest first."""
    found: list[Attempt] = []
    for record in ledger.read(run_dir):
        if record["event"] == "job_start":
            found.append(
                Attempt(
                    job=record.get("job", 0),
                    restart=record.get("restart", 0),
                    nodes=record.get("nodes", []),
                    started=record["time"],
                    first_checkpoint=record.get("checkpoint", -1),
                )
            )
        elif record["event"] == "job_end":
            _note_end(found, record)
    return found


def _note_end(found: list[Attempt], record: dict[str, Any]) -> None:
    which = (record.get("job", 0), record.get("restart", 0))
    for attempt in reversed(found):
        if (attempt.job, attempt.restart) == which and attempt.ended is None:
            attempt.ended = record.get("ended", record["time"])
            attempt.last_checkpoint = record.get("checkpoint", -1)
            attempt.cause, attempt.decision = record.get("cause"), record.get("decision")
            attempt.reason = record.get("reason", "")
            return


def failures_in_a_row(found: list[Attempt]) -> list[Attempt]:
    """The newest ends without a new checkpoint, newest first, since progress or a hold."""
    row: list[Attempt] = []
    for attempt in reversed(found):
        if attempt.ended is None:
            continue
        if attempt.has_progress or attempt.decision == "hold":
            break
        if attempt.cause not in PATIENT_CAUSES:
            row.append(attempt)
    return row


def bad_nodes(run_dir: Path) -> dict[str, str]:
    """Nodes that this run keeps off, with what is wrong with them."""
    bad: dict[str, str] = {}
    for record in ledger.read(run_dir):
        if record["event"] == "bad_nodes":
            bad |= record.get("nodes", {})
        elif record["event"] == "bad_nodes_forgiven":
            bad = {}
    return bad


def newest_checkpoint(checkpoints: Path) -> int:
    """The step of the checkpoint that a start would resume from; -1 if there is none."""
    name = read_latest(checkpoints)
    step = checkpoint_step(name) if name else None
    return -1 if step is None else step


def settle_lost(run_dir: Path, checkpoint: int, dead: dict[str, str]) -> None:
    """Writes the ends of earlier attempts that had no time to do it themselves.

    Args:
        run_dir: the run's folder.
        checkpoint: step of its newest checkpoint, now.
        dead: nodes that Slurm says are down.
    """
    for attempt in [attempt for attempt in attempts(run_dir) if attempt.ended is None]:
        gone = [name for name in attempt.nodes if name in dead]
        reason = (
            f"the job went away without a word, and {', '.join(gone)} is down"
            if gone
            else "the job went away without a word: its first node, or Slurm, ended it"
        )
        print(f"[job] job {attempt.job}, start {attempt.restart}: {reason}")
        ledger.append(
            run_dir,
            "job_end",
            job=attempt.job,
            restart=attempt.restart,
            code=None,
            cause=Cause.NODE_FAILURE,
            reason=reason,
            decision="requeue",
            dead_nodes=gone,
            checkpoint=checkpoint,
            ended=round(time.time(), 3),
        )
