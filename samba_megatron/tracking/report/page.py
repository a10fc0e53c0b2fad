"""Puts the report together: one HTML file, with its style, script and numbers inside."""

import html
import json
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from samba_megatron.tracking.history import Floats, History
from samba_megatron.tracking.numbers import format_count, format_duration
from samba_megatron.tracking.report import charts
from samba_megatron.tracking.report.events import Event, events_of
from samba_megatron.tracking.shipping import flatten

_MOST_EVENTS = 300
_RECENT = 20
# Nothing may be loaded, whatever a run is called: the page works offline and tells nobody.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
_ROOMS = ("layout", "kernels", "versions")


def render(runs: Sequence[History], now: float | None = None) -> str:
    """The page.

    Args:
        runs: one, or several to be compared.
        now: seconds since 1970, for the age of a run that is going on.
    """
    now = time.time() if now is None else now
    events = [events_of(run) for run in runs]
    title = runs[0].name if len(runs) == 1 else ", ".join(run.name for run in runs)
    state = _state(runs[0], now) if len(runs) == 1 else f"{len(runs)} runs"
    numbers = json.dumps(charts.build(runs, events), separators=(",", ":"), allow_nan=False)
    sections = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="state">{_text(state)}</p>',
        _summary(runs, now),
        '<nav id="controls"></nav><div class="charts" id="charts"></div>',
        "<noscript>The charts are drawn by a script in this file: allow it to run.</noscript>",
        _data_table(runs),
        *(_events_table(run, some, len(runs) > 1) for run, some in zip(runs, events, strict=True)),
        _config(runs[0]) if len(runs) == 1 else _differences(runs),
        f"<footer>written {_moment(now)} from metrics.jsonl and run.jsonl</footer>",
    ]
    return _PAGE.format(
        policy=_POLICY,
        title=_text(title),
        style=_asset("page.css"),
        body="\n".join(sections),
        # Within a script element only this sequence could end it.
        data=numbers.replace("</", "<\\/"),
        script=_asset("page.js"),
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
<script type="application/json" id="data">{data}</script>
<script>
{script}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return files("samba_megatron.tracking.report").joinpath(name).read_text(encoding="utf-8")


def _text(value: object) -> str:
    return html.escape(str(value))


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _state(run: History, now: float) -> str:
    """How the run ended, or how long ago it was last heard of."""
    if run.end is not None:
        return f"ended {_moment(run.end['time'])}: {run.end.get('reason', '')}"
    times = run.train.get("time", np.zeros(0))
    newest = max([*times[-1:].tolist(), *(record["time"] for record in run.records)], default=0.0)
    ago = format_duration(max(now - newest, 0.0))
    return f"no end is recorded; the newest record was {ago} old when this was written"


def _summary(runs: Sequence[History], now: float) -> str:
    facts = [dict(_facts(run, now if len(runs) > 1 else None)) for run in runs]
    head = ""
    if len(runs) > 1:
        swatch = '<i class="swatch" style="background:var(--c{})"></i>{}'
        cells = (swatch.format(number % 8, _text(run.name)) for number, run in enumerate(runs))
        head = "<tr><th></th>" + "".join(f"<th>{cell}</th>" for cell in cells) + "</tr>"
    rows = (_row(name, [some.get(name, "") for some in facts]) for name in _merged(facts))
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>'


def _merged(facts: Sequence[dict[str, str]]) -> list[str]:
    """All names; one that only later runs have stands where they have it."""
    names: list[str] = []
    for some in facts:
        place = 0
        for name in some:
            if name in names:
                place = names.index(name) + 1
            else:
                names.insert(place, name)
                place += 1
    return names


def _row(name: str, values: Sequence[str]) -> str:
    cells = "".join(f"<td>{_text(value)}</td>" for value in values)
    return f"<tr><th>{_text(name)}</th>{cells}</tr>"


def _facts(run: History, now: float | None) -> Iterator[tuple[str, str]]:
    """Rows of the table at the top; those of which nothing is known are left out."""
    start, train = run.start, run.train
    if now is not None:
        yield "state", _state(run, now)
    if start:
        ranks = start.get("layout", {}).get("world_size", 1)
        yield "where", f"{ranks} × {start.get('device', '?')}"
        yield "parameters", format_count(start.get("parameters") or 0)
    if not len(train.get("step", ())):
        yield "steps", "none yet"
        return
    target = start.get("run", {})
    yield "step", _of(int(train["step"][-1]), target.get("steps"), str)
    if "tokens" in train:
        yield "tokens", _of(train["tokens"][-1], target.get("tokens"), format_count)
    yield from _times(run)
    yield from _results(run)
    for column, name, shown in _SPEEDS:
        value = _median(train, column)
        if value is not None:
            yield name, shown(value)
    if memory := _finite(train, "memory_gib"):
        yield "memory", f"{max(memory):.2f} GiB at most"
    yield from _saves(run)


_SPEEDS = (
    ("tokens_per_second", "speed", lambda value: f"{format_count(value)} tokens/s"),
    ("tflops_per_device", "model FLOPs", lambda value: f"{value:.3g} TFLOP/s a device"),
    ("mfu", "MFU", lambda value: f"{value:.1%}"),
    ("mfu_of_precision", "MFU of the precision's peak", lambda value: f"{value:.1%}"),
)
"""Medians over all steps."""


def _of(done: float, target: float | None, shown: Any) -> str:
    return f"{shown(done)} of {shown(target)} ({done / target:.1%})" if target else shown(done)


def _times(run: History) -> Iterator[tuple[str, str]]:
    first = min([run.train["time"][0], *(r["time"] for r in run.records[:1])])
    wall = float(run.train["time"][-1] - first)
    training = float(np.nansum(run.train.get("seconds.step", np.zeros(1))))
    share = f", {min(training / wall, 1.0):.1%} of it in steps" if training and wall > 0 else ""
    yield "time", f"{format_duration(wall)}{share}"
    lives = sum(record["kind"] == "start" for record in run.records)
    if lives > 1:
        redone = f"; {run.redone_steps} steps were lost and done again" * bool(run.redone_steps)
        yield "restarts", f"{lives - 1}{redone}"


def _results(run: History) -> Iterator[tuple[str, str]]:
    if losses := _finite(run.train, "loss"):
        recent = losses[-_RECENT:]
        yield "loss", f"{sum(recent) / len(recent):.4f}, mean of the last {len(recent)} steps"
    for length, columns in run.validation.items():
        if held_out := _finite(columns, "loss"):
            perplexity = f", perplexity {np.exp(held_out[-1]):,.2f}" if held_out[-1] < 50 else ""
            best = f" (best {min(held_out):.4f})" if min(held_out) < held_out[-1] else ""
            yield f"held out, {length} tokens", f"{held_out[-1]:.4f}{best}{perplexity}"


def _saves(run: History) -> Iterator[tuple[str, str]]:
    if stalls := _finite(run.checkpoints, "stall_seconds"):
        longest = f"the loop stood {np.median(stalls):.2f} s (median), {max(stalls):.2f} s at most"
        yield "checkpoints", f"{len(stalls)} saved; {longest}"


def _finite(columns: dict[str, Floats], name: str) -> list[float]:
    values = columns.get(name)
    return [] if values is None else values[np.isfinite(values)].tolist()


def _median(columns: dict[str, Floats], name: str) -> float | None:
    values = _finite(columns, name)
    return float(np.median(values)) if values else None


def _data_table(runs: Sequence[History]) -> str:
    """Tokens by source, with a bar for the share."""
    rows = []
    for run in runs:
        sources = {name: _counts(given) for name, given in run.consumed.items()}
        total = sum(tokens for tokens, _ in sources.values()) or 1.0
        for name, (tokens, epochs) in sorted(sources.items(), key=lambda item: -item[1][0]):
            share = tokens / total
            bar = f'<span class="bar" style="width:{8 * share:.2f}rem"></span> {share:.1%}'
            of_run = f"<td>{_text(run.name)}</td>" if len(runs) > 1 else ""
            rows.append(
                f"<tr>{of_run}<td>{_text(name)}</td><td class=n>{format_count(tokens)}</td>"
                f"<td>{bar}</td><td class=n>{epochs}</td></tr>"
            )
    if not rows:
        return ""
    head = "<th>run</th>" * (len(runs) > 1)
    head += "<th>source</th><th>tokens</th><th>share</th><th>epochs</th>"
    table = f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    return f"<h2>data consumed, as of the newest checkpoint</h2>{table}"


def _counts(given: Any) -> tuple[float, str]:
    if not isinstance(given, dict):
        return float(given), ""
    epochs = given.get("epochs")
    tokens = given.get("tokens") or 0
    return float(tokens), "" if epochs is None else f"{epochs:.3g}"


def _events_table(run: History, events: Sequence[Event], several: bool) -> str:
    if not events:
        return ""
    of_run = f" of {_text(run.name)}" if several else ""
    more = f" (the newest {_MOST_EVENTS} of {len(events)})" if len(events) > _MOST_EVENTS else ""
    rows = "".join(map(_event_row, events[-_MOST_EVENTS:]))
    head = "<tr><th>time</th><th>step</th><th>job</th><th>event</th><th></th></tr>"
    table = f'<div class="scroll"><table>{head}{rows}</table></div>'
    return f"<h2>what happened{of_run}{more}</h2>{table}"


def _event_row(event: Event) -> str:
    step = "" if event.step is None else event.step
    cells = f"<td class=t>{_moment(event.time)}</td><td class=n>{step}</td>"
    cells += f"<td class=t>{_text(event.job)}</td><td class=t>{_text(event.name)}</td>"
    return f'<tr class="{event.mark}">{cells}<td>{_text(event.text)}</td></tr>'


def _described(run: History) -> dict[str, Any]:
    """The resolved configuration, and what it came to on the machine, by dotted names."""
    rooms = {name: run.start.get(name, {}) for name in _ROOMS}
    more = {name: run.start.get(name) for name in ("device", "parameters")}
    return flatten(run.config) | flatten({"chosen": rooms}) | flatten({"chosen": more})


def _config(run: History) -> str:
    described = _described(run)
    if not described:
        return ""
    rows = "".join(_row(name, [str(value)]) for name, value in described.items())
    table = f'<div class="scroll"><table>{rows}</table></div>'
    return f"<details><summary>configuration, as resolved</summary>{table}</details>"


def _differences(runs: Sequence[History]) -> str:
    """Fields whose values are not the same in all runs."""
    described = [_described(run) for run in runs]
    names = dict.fromkeys(name for fields in described for name in fields)
    rows = ""
    for name in names:
        values = [str(fields.get(name, "—")) for fields in described]
        if len(set(values)) > 1:
            rows += _row(name, values)
    head = "".join(f"<th>{_text(run.name)}</th>" for run in runs)
    table = f'<div class="scroll"><table><tr><th>field</th>{head}</tr>{rows}</table></div>'
    return f"<h2>differences of the configurations</h2>{table if rows else 'none'}"
