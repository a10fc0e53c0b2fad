"""Gathers what is known about the end of a job: its ledger, Slurm's words, and the logs.

Standard library only.
"""

import re
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from samba_megatron.tracking import ledger
from slurm import history, scheduler
from slurm.decide import Evidence, FirstFailure

SRUN_LOG = "srun_rank.log"
OUT_OF_TIME = "out_of_time"
"""The job script makes it when it ends the ranks, just before the limit."""
_END_OF_LOG = 20_000
"""Bytes at the end of a rank's log that are looked at."""
_TASK_FAILED = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.+)")
_NODE_FAILED = re.compile(r"srun: error: Node failure on (\S+)")
_NO_MEMORY = re.compile(
    r".*(?:OutOfMemoryError|CUDA out of memory|out-of-memory|oom[-_]kill|Out Of Memory|"
    r"DefaultCPUAllocator: can't allocate memory).*"
)


def gather(
    run_dir: Path, logs: Path, code: int, attempt: tuple[int, int], lead_seconds: float
) -> Evidence:
    """All that is known about the end of an attempt.

    Args:
        run_dir: the run's folder.
        logs: the attempt's logs: srun's, and one a rank.
        code: exit code of the training step.
        attempt: (job id, restart count).
        lead_seconds: time between Slurm's signal and the job's limit.
    """
    job = scheduler.job(attempt[0]) or {}
    first = first_failure(logs)
    end = _end_in_ledger(run_dir, attempt)
    # srun's code is the largest of all ranks': 143 where one was ended because another had failed.
    if end is not None and end.get("code") is not None:
        code = end["code"]
    elif code and first is not None and first.exit_code:
        code = first.exit_code
    return Evidence(
        code=code,
        end=end,
        job=job,
        is_out_of_time=(logs / OUT_OF_TIME).exists(),
        is_ending_early=_is_ending_early(job),
        seconds_left=seconds_until(job.get("EndTime", "")),
        signal_lead=lead_seconds,
        dead_nodes=_dead_nodes(run_dir, logs),
        first=first,
        out_of_memory=_out_of_memory(logs, first) if code else None,
    )


def _end_in_ledger(run_dir: Path, attempt: tuple[int, int]) -> dict[str, Any] | None:
    """The first ``end`` of the attempt: later ones are of ranks that fell because of it."""
    for record in ledger.read(run_dir, "end"):
        if (record.get("job", 0), record.get("restart", 0)) == attempt:
            return record
    return None


def _dead_nodes(run_dir: Path, logs: Path) -> dict[str, str]:
    """Of the nodes that the job started on: Slurm forgets them when it puts the job back."""
    dead = dict.fromkeys(_NODE_FAILED.findall(_text(logs / SRUN_LOG)), "failed")
    return dead | scheduler.dead_nodes(history.attempts(run_dir)[-1].nodes)


def seconds_until(moment: str) -> float | None:
    """Until a time as Slurm writes it; None if it is none."""
    try:
        return datetime.fromisoformat(moment).timestamp() - time.time()
    except ValueError:  # "Unknown", "N/A", or the job is not known
        return None


def _is_ending_early(job: dict[str, str]) -> bool:
    """Slurm calls every job that it is ending COMPLETING, whatever the reason."""
    if job.get("JobState") != "COMPLETING":
        return False
    ran, limit = (scheduler.seconds(job.get(name, "")) for name in ("RunTime", "TimeLimit"))
    return ran is not None and (limit is None or ran < limit)


def first_failure(logs: Path) -> FirstFailure | None:
    """The task that srun reported first, with the last words of its log."""
    for line in _text(logs / SRUN_LOG).splitlines():
        found = _TASK_FAILED.match(line)
        if found:
            node, tasks, what = found.groups()
            words = _last_words(_rank_log(logs, re.split("[,-]", tasks)[0]))
            return FirstFailure(node, tasks, what, words)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _rank_log(logs: Path, task: str) -> Path:
    """``rank_0003.log`` for task 3; srun pads with zeros."""
    return logs / f"rank_{int(task):04d}.log"


def _last_words(log: Path) -> str:
    noise = (" ", "srun:", "slurmstepd")
    lines = [line for line in _end(log) if line.strip() and not line.startswith(noise)]
    return lines[-1].strip()[:300] if lines else ""


def _end(log: Path) -> list[str]:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - _END_OF_LOG))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _out_of_memory(logs: Path, first: FirstFailure | None) -> str | None:
    """The first line that says so, in srun's log or in that of the task that fell first."""
    for line in _lines_of_interest(logs, first):
        found = _NO_MEMORY.match(line)
        if found:
            return found[0].strip()[:300]
    return None


def _lines_of_interest(logs: Path, first: FirstFailure | None) -> Iterator[str]:
    yield from _end(logs / SRUN_LOG)
    if first is not None:
        yield from _end(_rank_log(logs, re.split("[,-]", first.tasks)[0]))
