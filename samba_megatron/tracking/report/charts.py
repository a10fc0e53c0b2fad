"""What the report draws, as JSON for ``page.js``: charts of lines, each line of one run.

A line has steps and values only. Tokens and hours at a step come from its run's ruler, so that the
horizontal axis can be any of the three.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from samba_megatron.tracking.history import Floats, History
from samba_megatron.tracking.report.events import Event, marks
from samba_megatron.tracking.report.thinning import averaged, running_mean, thinned

Json = dict[str, Any]

_POINTS = 4800
"""Of one quantity, over all runs."""
_FEWEST_POINTS = 300
_AVERAGED_STEPS = 20
_STRETCHES = 120
"""Of a chart of means."""
_DIGITS = 6

_FINE_PARTS = ("data", "forward", "backward", "graph", "gradient_reduce", "bubble", "optimizer")
_COARSE_PARTS = ("data", "forward_backward", "optimizer")
_SINGLE = (
    ("learning rate", "", "lr", None),
    ("gradient norm", "before clipping", "grad_norm", "log"),
    ("throughput", "tokens a second, the whole run", "tokens_per_second", None),
    ("MFU", "model FLOPs of the bf16 peak", "mfu", None),
)
"""Charts of one column: title, unit, column, scale."""
_FLOPS = (("tflops_per_device", "model"), ("hardware_tflops_per_device", "with recomputation"))
_MEMORY = (("memory_gib", "allocated"), ("memory_reserved_gib", "reserved"))
_SAVING = (
    ("stall_seconds", "the loop stood"),
    ("write_seconds", "writing"),
    ("commit_seconds", "publishing"),
)
_RANKS = (("compute_seconds.min", "fastest rank"), ("compute_seconds.median", "median"),
          ("compute_seconds.max", "slowest rank"))  # fmt: skip


def build(runs: Sequence[History], events: Sequence[Sequence[Event]]) -> Json:
    """Everything that ``page.js`` needs.

    Args:
        runs: to be drawn over each other.
        events: of each run.
    """
    limit = max(_FEWEST_POINTS, _POINTS // (4 * len(runs)))
    charts = [
        _loss(runs, limit),
        *(_single(runs, limit, *chart) for chart in _SINGLE),
        _several(runs, limit, "TFLOP/s", "a device", _FLOPS),
        _several(runs, limit, "memory", "GiB, the fullest since the start", _MEMORY),
        *_time_split(runs),
        _several(runs, limit, "ranks", "seconds of computing a step", _RANKS),
        _checkpoints(runs, limit),
    ]
    return {
        "runs": [
            {"name": run.name, "ruler": _ruler(run, limit), "marks": marks(some)}
            for run, some in zip(runs, events, strict=True)
        ],
        "charts": [chart for chart in charts if chart["lines"]],
    }


def numbers(values: Floats) -> list[float | None]:
    """Rounded to what can be seen; null where there is no finite value."""
    return [float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None for value in values]


def _ruler(run: History, limit: int) -> Json:
    """Steps with their tokens and hours since the run's first record."""
    steps = run.train.get("step", np.zeros(0))
    picked = np.unique(np.linspace(0, max(len(steps) - 1, 0), limit).astype(int))[: len(steps)]
    tokens = run.train.get("tokens", steps)[picked]
    times = run.train.get("time", steps)[picked]
    first = _first_time(run)
    return {
        "steps": steps[picked].tolist(),
        "tokens": [0 if not np.isfinite(token) else token for token in tokens.tolist()],
        "hours": numbers((times - first) / 3600),
    }


def _first_time(run: History) -> float:
    times = [record["time"] for record in run.records[:1]]
    times += run.train["time"][:1].tolist() if len(run.train.get("time", ())) else []
    return float(min(times, default=0.0))


def _chart(title: str, unit: str, lines: list[Json], **more: Any) -> Json:
    return {"title": title, "unit": unit, "lines": lines, **more}


def _line(run: int, label: str, steps: Floats, values: Floats, **more: Any) -> Json:
    return {"run": run, "label": label, "steps": steps.tolist(), "values": numbers(values), **more}


def _loss(runs: Sequence[History], limit: int) -> Json:
    lines: list[Json] = []
    for number, run in enumerate(runs):
        if "loss" in run.train:
            lines += _training_loss(number, run, limit)
        for length, columns in run.validation.items():
            if "loss" in columns:
                label = f"held out, {length} tokens"
                points = thinned(columns["step"], columns["loss"], limit)
                lines.append(_line(number, label, *points, style="dots"))
    return _chart("loss", "nats a token", lines, wide=True)


def _training_loss(number: int, run: History, limit: int) -> Iterator[Json]:
    steps, losses = run.train["step"], run.train["loss"]
    if len(steps) > 2 * _AVERAGED_STEPS:
        window = max(_AVERAGED_STEPS, len(steps) // 200)
        yield _line(number, "training, each step", *thinned(steps, losses, limit), style="faint")
        mean = thinned(steps, running_mean(losses, window), limit)
        yield _line(number, f"training, mean of {window} steps", *mean)
    else:
        yield _line(number, "training, each step", *thinned(steps, losses, limit))


def _single(
    runs: Sequence[History], limit: int, title: str, unit: str, column: str, scale: str | None
) -> Json:
    lines = [
        _line(number, title, *thinned(run.train["step"], run.train[column], limit))
        for number, run in enumerate(runs)
        if _has(run.train, column)
    ]
    return _chart(title, unit, lines, scale=scale)


def _several(
    runs: Sequence[History], limit: int, title: str, unit: str, columns: Sequence[tuple[str, str]]
) -> Json:
    lines = []
    for number, run in enumerate(runs):
        for column, label in _told_apart(run, columns):
            if _has(run.train, column):
                known = np.isfinite(run.train[column])
                points = thinned(run.train["step"][known], run.train[column][known], limit)
                lines.append(_line(number, label, *points))
    return _chart(title, unit, lines)


def _told_apart(run: History, columns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without those that are the same as the first (a CPU reserves what it allocates)."""
    first = run.train.get(columns[0][0])
    return [
        (column, label)
        for number, (column, label) in enumerate(columns)
        if not number
        or first is None
        or not np.array_equal(run.train.get(column, first), first, equal_nan=True)
    ]


def _time_split(runs: Sequence[History]) -> Iterator[Json]:
    """One chart a run: where the seconds of a step go, means over stretches of steps."""
    for number, run in enumerate(runs):
        if not _has(run.train, "seconds.step"):
            continue
        of_run = f" of {run.name}" if len(runs) > 1 else ""
        lines = [
            _line(number, label, *averaged(run.train["step"], values, _STRETCHES))
            for label, values in parts_of_step(run)
        ]
        yield _chart(f"time of a step{of_run}", "seconds, means", lines, stacked=True)


def parts_of_step(run: History) -> Iterator[tuple[str, Floats]]:
    """(part, seconds by step), without parts that take nothing; what is left is ``other``."""
    columns = run.train
    parts = _FINE_PARTS if "seconds.forward" in columns else _COARSE_PARTS
    rest = np.nan_to_num(columns["seconds.step"])
    for part in parts:
        seconds = np.nan_to_num(columns.get(f"seconds.{part}", np.zeros_like(rest)))
        rest = rest - seconds
        if seconds.any():
            yield part.replace("_", " "), seconds
    yield "other", np.maximum(rest, 0.0)
    if _has(columns, "seconds.checkpoint_stall") and columns["seconds.checkpoint_stall"].any():
        yield "saving, after the step", np.nan_to_num(columns["seconds.checkpoint_stall"])


def _checkpoints(runs: Sequence[History], limit: int) -> Json:
    lines = [
        _line(number, label, *thinned(run.checkpoints["step"], run.checkpoints[column], limit),
              style="dots")
        for number, run in enumerate(runs)
        for column, label in _SAVING
        if _has(run.checkpoints, column)
    ]  # fmt: skip
    return _chart("checkpoints", "seconds a save", lines, scale="log")


def _has(columns: dict[str, Floats], name: str) -> bool:
    return name in columns and bool(np.isfinite(columns[name]).any())
