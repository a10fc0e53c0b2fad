"""One screen about a run: where it is, how fast, how it has lived, when it will be done.

    python slurm/status.py RUN

Reads the run's files; asks Slurm where there is one that still knows the job.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from samba_megatron.checkpoint.folder import list_checkpoints, read_latest  # noqa: E402
from samba_megatron.platform.errors import UserError, run_command  # noqa: E402
from samba_megatron.tracking import metrics  # noqa: E402
from samba_megatron.tracking.numbers import format_count, format_duration  # noqa: E402
from slurm import history, scheduler  # noqa: E402
from slurm.history import Attempt  # noqa: E402
from slurm.lifecycle import PLAN_FILE, Plan  # noqa: E402

_RECENT_STEPS = 50
_SHOWN_ENDS = 8


class Training(NamedTuple):
    """What the metrics say."""

    step: int
    tokens: int
    loss: float | None
    tokens_per_second: float | None
    """Median of the newest steps."""
    seconds_since: float
    """Since the newest step."""


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the run's folder, as given to submit.py")
    run_dir: Path = parser.parse_args().run
    if not run_dir.is_dir():
        raise UserError(f"there is no folder {run_dir}: give the one that submit.py was given")
    attempts, training = history.attempts(run_dir), read_training(run_dir)
    if not attempts and training is None and not (run_dir / "slurm").is_dir():
        raise UserError(f"{run_dir} is no run's folder: it has neither slurm/ nor metrics.jsonl")
    console = Console()
    console.print(overview(run_dir, attempts, training))
    if attempts:
        console.print(table_of_ends(attempts))


def overview(run_dir: Path, attempts: list[Attempt], training: Training | None) -> Table:
    """The state in rows."""
    table = Table(title=str(run_dir), show_header=False, title_justify="left", box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    target = read_target(run_dir)
    rows = {
        "state": state(run_dir, attempts),
        **({} if training is None else _progress(training, target)),
        "checkpoint": _checkpoint(_checkpoints(run_dir)),
        "restarts": _restarts(attempts),
        "bad nodes": ", ".join(f"{n} ({w})" for n, w in history.bad_nodes(run_dir).items()),
    }
    for name, text in rows.items():
        table.add_row(name, text or "none")
    return table


def state(run_dir: Path, attempts: list[Attempt]) -> str:
    """From Slurm where it knows the job, else from the ledger."""
    queued = _queued(run_dir)
    if queued:
        return "; ".join(_of_job(job) for job in queued)
    if not attempts:
        return "submitted, not started, and not in a queue that this machine can see"
    last = attempts[-1]
    if last.ended is None:
        return f"job {last.job} started and has not said its end; Slurm does not know it here"
    words = {
        "done": "done",
        "stop": "stopped; submit again to go on",
        "hold": "held; a person must look, then submit again",
        "requeue": "between two jobs; none is in a queue that this machine can see",
    }
    return f"{words.get(last.decision or '', str(last.decision))} ({last.cause}: {last.reason})"


def _queued(run_dir: Path) -> list[scheduler.QueuedJob]:
    if not (run_dir / "slurm" / PLAN_FILE).is_file() or not scheduler.is_here():
        return []
    try:
        return scheduler.queued(Plan.read(run_dir).job_name)
    except scheduler.SlurmError:
        return []


def _of_job(job: scheduler.QueuedJob) -> str:
    if job.state == "PENDING":
        when = "" if job.start == "N/A" else f", expected to start {job.start}"
        return f"job {job.id} PENDING ({job.reason}){when}"
    return f"job {job.id} {job.state}, {job.time_left} left"


def read_training(run_dir: Path) -> Training | None:
    """The newest steps in ``metrics.jsonl``; None before the first."""
    path = run_dir / metrics.FILE_NAME
    if not path.exists():
        return None
    steps = metrics.read_metrics(path, "train")[-_RECENT_STEPS:]
    if not steps:
        return None
    rates = sorted(r["tokens_per_second"] for r in steps if r.get("tokens_per_second"))
    newest = steps[-1]
    return Training(
        step=newest["step"],
        tokens=newest["tokens"],
        loss=newest["loss"],
        tokens_per_second=rates[len(rates) // 2] if rates else None,
        seconds_since=time.time() - newest["time"],
    )


def read_target(run_dir: Path) -> int | None:
    """Tokens of the whole run, by the configuration that was submitted; with steps and no ramp."""
    from samba_megatron.config.load import from_dict
    from samba_megatron.config.recipes import read_yaml
    from samba_megatron.config.rules.situation import Situation

    path = run_dir / "slurm" / "config.yaml"
    if not path.is_file():
        return None
    config = from_dict(read_yaml(path.read_text(), str(path)), f"in {path}")
    return Situation(config, 1, "cpu", None, None).run_tokens


def _progress(training: Training, target: int | None) -> dict[str, str]:
    done = format_count(training.tokens)
    rate = training.tokens_per_second
    rows = {"step": f"{training.step}, {format_duration(training.seconds_since)} ago"}
    rows["tokens"] = done
    if target:
        rows["tokens"] = f"{done} of {format_count(target)} ({training.tokens / target:.1%})"
    if rate:
        rows["speed"] = f"{format_count(rate)} tokens/s"
    rows["loss"] = "not finite" if training.loss is None else f"{training.loss:.4f}"
    if target and rate:
        left = max(target - training.tokens, 0) / rate
        rows["ETA"] = f"{format_duration(left)} of training" if left else "done"
    return rows


def _checkpoints(run_dir: Path) -> Path:
    if (run_dir / "slurm" / PLAN_FILE).is_file():
        return Path(Plan.read(run_dir).checkpoints)
    return run_dir / "checkpoints"


def _checkpoint(folder: Path) -> str:
    latest = read_latest(folder)
    paths = {path.name: path for _, path in list_checkpoints(folder)}
    if latest is None or latest not in paths:
        return ""
    age = format_duration(time.time() - paths[latest].stat().st_mtime)
    return f"{latest}, {age} old, {len(paths)} kept in {folder}"


def _restarts(attempts: list[Attempt]) -> str:
    if len(attempts) < 2:
        return ""
    causes: dict[str, int] = {}
    for attempt in attempts[:-1]:
        causes[str(attempt.cause)] = causes.get(str(attempt.cause), 0) + 1
    why = ", ".join(f"{count} × {cause}" for cause, count in causes.items())
    return f"{len(attempts) - 1} ({why})"


def table_of_ends(attempts: list[Attempt]) -> Table:
    """The newest starts and how they ended."""
    table = Table(title_justify="left", box=None, header_style="bold")
    for name in ("job", "start", "nodes", "lasted", "checkpoint", "end", "then"):
        table.add_column(name, overflow="fold")
    for attempt in attempts[-_SHOWN_ENDS:]:
        table.add_row(*_row(attempt))
    return table


def _row(attempt: Attempt) -> list[str]:
    lasted = (attempt.ended or time.time()) - attempt.started
    end: Any = "still going, or lost" if attempt.ended is None else attempt.cause
    reason = f": {attempt.reason}" if attempt.reason else ""
    newest = attempt.last_checkpoint if attempt.ended is not None else attempt.first_checkpoint
    return [
        f"{attempt.job}.{attempt.restart}",
        time.strftime("%m-%d %H:%M:%S", time.localtime(attempt.started)),
        str(len(attempt.nodes)),
        format_duration(lasted),
        "-" if newest in (None, -1) else str(newest),
        f"{end}{reason}",
        attempt.decision or "",
    ]


if __name__ == "__main__":
    run_command(main)
