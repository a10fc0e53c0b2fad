"""``run.jsonl``: what happened to a run, one JSON object a line, over all its jobs and restarts.

``metrics.jsonl`` says how the training went; this file says how the run lived: when each job
started and on which nodes, why it ended, which faults it survived. Whoever decides whether a run
is started again reads it, and so does a person who asks why it stopped.

Only the standard library is imported: job scripts append here before anything heavy is loaded.
"""

import json
import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Any

from samba_megatron.tracking import json_lines

FILE_NAME = "run.jsonl"

_SLURM_FIELDS = {"job": "SLURM_JOB_ID", "restart": "SLURM_RESTART_COUNT"}


class Cause(StrEnum):
    """Why a run, or one job of it, ended."""

    DONE = "done"
    """All tokens or steps are done."""
    TIME_LIMIT = "time limit"
    """The job's time was over; the state is saved."""
    PREEMPTED = "preempted"
    """The scheduler wanted the nodes for another job; the state is saved."""
    NODE_FAILURE = "node failure"
    """A node, or the job with it, went away without a word."""
    OUT_OF_MEMORY = "out of memory"
    """A device or a host had too little memory."""
    HANG = "hang"
    """No step was finished within the allowed time."""
    NON_FINITE = "non-finite"
    """A loss or gradient was not finite, again and again."""
    BAD_NODE = "bad node"
    """A node failed its check, or computed something it could not repeat."""
    CHECKPOINT = "corrupt checkpoint"
    """No checkpoint of the run is whole."""
    USER_STOP = "user stop"
    """A person asked for the stop; the state is saved."""
    USER_ERROR = "user error"
    """The configuration or the input was wrong."""
    CRASH_LOOP = "crash loop"
    """It failed too often without a new checkpoint."""
    BUG = "bug"
    """An unexpected error; there is a traceback."""


def append(run_dir: Path, event: str, **values: Any) -> dict[str, Any]:
    """Adds one object to the run's ledger and returns it.

    The time is added, and inside a Slurm job its id and restart count. One write to a file opened
    for appending: lines of several processes do not mix.

    Args:
        run_dir: the run's folder; made when missing.
        event: what happened, e.g. ``start``, ``end``, ``fault``.
        values: what there is to say about it; must be JSON.
    """
    record: dict[str, Any] = {"event": event, "time": round(time.time(), 3)}
    for name, variable in _SLURM_FIELDS.items():
        if os.environ.get(variable):
            record[name] = int(os.environ[variable])
    record |= values
    run_dir.mkdir(parents=True, exist_ok=True)
    line = (json.dumps(record) + "\n").encode()
    path = run_dir / FILE_NAME
    if json_lines.ends_in_half_a_line(path):
        line = b"\n" + line
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return record


def read(run_dir: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The objects of a run's ledger in order, or those of one kind; [] where there is none.

    A line that a killed process left half-written is skipped.
    """
    try:
        records = json_lines.read(run_dir / FILE_NAME, "event")
    except FileNotFoundError:
        return []
    return [record for record in records if event in (None, record["event"])]
