"""What happened to a run, from its ledger, and where that is marked in the charts.

A run without a ledger (``run.jsonl``) still has its starts, ends and skipped steps in its metrics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from samba_megatron.tracking.history import History

_FAULTS = {"hang", "failure", "fallback", "bad_nodes", "hold"}
_DETOURS = {"skipped", "rollback"}
_SAID = {"event", "kind", "time", "step", "job", "restart"}
_MOST_MARKS = 200
_LONGEST = 400


@dataclass(frozen=True)
class Event:
    """One line of the table."""

    time: float
    step: int | None
    name: str
    job: str
    text: str
    mark: str = ""
    """``restart``, ``fault`` or ``detour``, where it is marked in the charts."""


def events_of(run: History) -> list[Event]:
    """Everything that happened, oldest first; a start from nothing and a good end are no marks."""
    records = run.ledger or [
        {**record, "event": record["kind"]}
        for record in run.records
        if record["kind"] != "stragglers"
    ]
    events = [_event(record, run) for record in records]
    events += [_event({**r, "event": "stragglers"}, run) for r in run.records
               if r["kind"] == "stragglers"]  # fmt: skip
    if run.ledger and not any(event.mark == "restart" for event in events):
        events += [_event({**r, "event": "start"}, run) for r in run.records
                   if r["kind"] == "start" and _resumed(r)]  # fmt: skip
    return sorted(events + _not_finite(run), key=lambda event: event.time)


def marks(events: Sequence[Event]) -> list[dict[str, Any]]:
    """The events with a place in the charts, the newest if there are many."""
    placed = [event for event in events if event.mark and event.step is not None]
    return [
        {"step": event.step, "kind": event.mark, "text": f"{event.name}: {event.text}"}
        for event in placed[-_MOST_MARKS:]
    ]


def _event(record: dict[str, Any], run: History) -> Event:
    name, step = str(record["event"]), record.get("step")
    time = float(record.get("time") or 0.0)
    job = "" if record.get("job") is None else str(record["job"])
    if record.get("restart"):
        job += f".{record['restart']}"
    return Event(
        time=time,
        step=_step_at(run, time) if step is None else int(step),
        name="resume" if name == "start" and _resumed(record) else name.replace("_", " "),
        job=job,
        text=_sentence(name, record)[:_LONGEST],
        mark=_mark(name, record),
    )


def _mark(name: str, record: dict[str, Any]) -> str:
    if name == "start":
        return "restart" if _resumed(record) else ""
    if name == "end":
        code = record.get("code", record.get("exit_code"))
        return "fault" if code not in (0, 75, None) else ""
    return "fault" if name in _FAULTS else "detour" if name in _DETOURS else ""


def _resumed(record: dict[str, Any]) -> bool:
    inner = record.get("run")
    return bool(record.get("resumed") or (isinstance(inner, dict) and inner.get("resumed")))


def _sentence(name: str, record: dict[str, Any]) -> str:
    if name == "start":
        nodes = record.get("nodes") or [record.get("node", "?")]
        ranks = record.get("world_size") or record.get("layout", {}).get("world_size", "?")
        shown = ", ".join(map(str, nodes[:4])) + (
            f" and {len(nodes) - 4} more" if len(nodes) > 4 else ""
        )
        return f"{ranks} rank{'s' * (ranks != 1)} on {shown}"
    if name == "end":
        code = record.get("code", record.get("exit_code"))
        cause = f"{record['cause']}: " if record.get("cause") else ""
        return f"{cause}{record.get('reason', '')} (code {code})"
    if name == "hang":
        return "; ".join([str(record.get("seen", "")), *map(str, record.get("sentences", []))])
    if name == "failure":
        where = f"rank {record.get('rank')} on {record.get('host')}"
        return f"{where}: {record.get('type')}: {record.get('message')} {record.get('where', '')}"
    if name == "skipped":
        return str(record.get("reason", ""))
    return ", ".join(f"{key} {value}" for key, value in record.items() if key not in _SAID)


def _step_at(run: History, time: float) -> int | None:
    """The newest step before a moment."""
    steps = run.train.get("step")
    if steps is None or not len(steps):
        return None
    before = int(np.searchsorted(run.train["time"], time)) - 1
    return int(steps[before]) if before >= 0 else 0


def _not_finite(run: History) -> list[Event]:
    """Steps whose loss is null in the file."""
    if "loss" not in run.train:
        return []
    bad = np.flatnonzero(~np.isfinite(run.train["loss"]))[-_MOST_MARKS:]
    text = "the loss of this step is not a finite number"
    return [
        Event(
            float(run.train["time"][i]), int(run.train["step"][i]), "not finite", "", text, "fault"
        )
        for i in bad
    ]
