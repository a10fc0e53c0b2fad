"""The array of jobs that an unfinished run has sent, so that no second one does the same work."""

import re
import subprocess
from pathlib import Path

_ACTIVE = re.compile(r"PENDING|RUNNING|CONFIGURING|COMPLETING|REQUEUED|SUSPENDED|STOPPED")


def note_job(folder: Path, job: str) -> None:
    """Remembers the job of a pipeline whose state lies in ``folder``."""
    (folder / "slurm_job").write_text(job, encoding="utf-8")


def active_job(folder: Path) -> str | None:
    """The pipeline's job, if it still waits or runs."""
    try:
        job = (folder / "slurm_job").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return job if is_active(job) else None


def is_active(job: str) -> bool:
    """Whether any task of a job array waits or runs; when Slurm does not answer, it may."""
    command = ["squeue", "-h", "-o", "%T", "-j", job]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return False
    if result.returncode == 0:
        return bool(_ACTIVE.search(result.stdout))
    return "Invalid job id" not in result.stderr
