"""The live panel of a run, for a person at a terminal: everything worth a glance, in eight rows.

It hears the records of ``metrics.jsonl`` as they are written and draws between two steps, twice a
second at most, in the loop's own thread: nothing runs beside the training. The cursor is never
hidden, so that a killed run leaves the terminal as it was.
"""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from samba_megatron.tracking.numbers import format_count, format_duration

_SECONDS_BETWEEN_DRAWINGS = 0.5
_RECENT = 20
"""Steps whose median is the speed."""
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
_NARROW = 60
_PARTS = (
    *("data", "forward", "backward", "graph"),
    *("forward_backward", "gradient_reduce", "optimizer"),
)

Record = dict[str, Any]


class Sparkline:
    """A curve of any length in a row of characters: when it is full, neighbours become their mean.

    Args:
        capacity: characters at most; even.
    """

    def __init__(self, capacity: int = 64) -> None:
        self._capacity, self._stretch = capacity, 1
        self._means: list[float] = []
        self._pending: list[float] = []

    def add(self, value: float) -> None:
        """The next value; must be finite."""
        self._pending.append(value)
        if len(self._pending) < self._stretch:
            return
        self._means.append(statistics.fmean(self._pending))
        self._pending = []
        if len(self._means) == self._capacity:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(first + second) / 2 for first, second in pairs]
            self._stretch *= 2

    def draw(self, width: int, bars: str = _BARS) -> str:
        """The newest ``width`` characters."""
        shown = self._means[-width:] if width > 0 else []
        low, high = min(shown, default=0.0), max(shown, default=0.0)
        size = (high - low) or 1.0
        return "".join(bars[round((len(bars) - 1) * (value - low) / size)] for value in shown)


class RunState:
    """What is known of the run, from its records."""

    def __init__(self) -> None:
        self.name = ""
        self.newest: Record = {}
        self.steps = self.tokens = 0
        self.losses = Sparkline()
        self.rates: deque[float] = deque(maxlen=_RECENT)
        self.validations: dict[int, Record] = {}
        self.checkpoint: Record = {}
        self.faults: dict[str, int] = {}
        self.newest_fault = ""
        self.resumed_after: int | None = None

    def hear(self, record: Record) -> None:
        """Takes what a record says."""
        kind = record["kind"]
        if kind == "train":
            self.newest = record
            if record.get("loss") is not None:
                self.losses.add(record["loss"])
            if record.get("tokens_per_second"):
                self.rates.append(record["tokens_per_second"])
        elif kind == "validation":
            self.validations[record["sequence_length"]] = record
        elif kind == "checkpoint":
            self.checkpoint = record
        elif kind == "start":
            self.name = record.get("config", {}).get("name", "")
            run = record.get("run", {})
            self.steps, self.tokens = run.get("steps", 0), run.get("tokens", 0)
            self.resumed_after = record.get("step") if run.get("resumed") else None
        elif kind in ("skipped", "rollback", "stragglers"):
            self.faults[kind] = self.faults.get(kind, 0) + 1
            self.newest_fault = f"step {record.get('step')}: {_fault(record)}"

    @property
    def rate(self) -> float | None:
        """Tokens a second: the median of the newest steps."""
        return statistics.median(self.rates) if self.rates else None

    @property
    def eta_seconds(self) -> float | None:
        """Until all tokens are done."""
        if not (self.rate and self.tokens and self.newest):
            return None
        return max(self.tokens - self.newest["tokens"], 0) / self.rate


def _fault(record: Record) -> str:
    if record["kind"] == "rollback":
        return f"back from step {record.get('from_step')}"
    if record["kind"] == "stragglers":
        ranks = ", ".join(str(rank.get("rank")) for rank in record.get("ranks", []))
        return f"rank {ranks} is slower than the others"
    return str(record.get("reason", "skipped"))


class Panel:
    """Draws a :class:`RunState` at the bottom of a terminal; other lines go above it.

    Args:
        console: of a terminal.
        state: is heard from elsewhere.
        folder: the run's, for one without a name.
    """

    def __init__(self, console: Console, state: RunState, folder: str) -> None:
        self._console, self._state, self._folder = console, state, folder
        self._started, self._drawn = time.monotonic(), float("-inf")
        self._live = Live(console=console, auto_refresh=False)

    def start(self) -> None:
        """Takes the bottom of the terminal."""
        self._live.start()
        self._console.show_cursor(True)
        self.draw(force=True)

    def draw(self, force: bool = False) -> None:
        """Shows the present state, unless that was done a moment ago."""
        now = time.monotonic()
        if force or now - self._drawn >= _SECONDS_BETWEEN_DRAWINGS:
            self._drawn = now
            self._live.update(self.render(self._console.width), refresh=True)

    def stop(self) -> None:
        """Leaves the newest state on the screen and gives the terminal back."""
        try:
            self.draw(force=True)
        finally:
            self._live.stop()

    def abandon(self) -> None:
        """Gives the terminal back without drawing again."""
        self._live.update("")
        self._live.stop()

    def render(self, width: int) -> RenderableType:
        """The rows for a terminal of this many columns."""
        table = Table.grid(padding=(0, 1))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        room = max(width - 13, 8)
        for name, content in self._rows(room):
            table.add_row(name, content)
        elapsed = format_duration(time.monotonic() - self._started)
        name = self._state.name or self._folder
        title = Text(f"── {name}, {elapsed} ", style="bold", no_wrap=True)
        title.append("─" * max(width - len(title), 0), style="dim")
        title.truncate(width)
        return Group(title, table)

    def _rows(self, room: int) -> Iterator[tuple[str, RenderableType]]:
        state = self._state
        if not state.newest:
            resumed = state.resumed_after
            yield "step", "first step …" if resumed is None else f"resuming after step {resumed} …"
            return
        yield "loss", self._loss(room)
        yield "step", self._progress(room)
        yield "speed", _joined(self._speed(), room)
        yield "time", _joined(self._time(), room)
        yield "checkpoint", _joined(self._checkpoint(), room)
        if state.validations:
            yield "validation", _joined(self._validations(), room)
        yield "faults", self._faults()

    def _loss(self, room: int) -> Text:
        record = self._state.newest
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        text = Text(loss, style="bold")
        tail = f"  lr {record['lr']:.2e}, gradient {record['grad_norm']:.3f}"
        bars = _ASCII_BARS if self._console.options.ascii_only else _BARS
        wide = room - len(loss) - 2 - (len(tail) if room > _NARROW else 0)
        text.append(f"  {self._state.losses.draw(min(wide, 64), bars)}", style="cyan")
        return text.append(tail, style="dim") if room > _NARROW else text

    def _progress(self, room: int) -> RenderableType:
        state, tokens = self._state, self._state.newest["tokens"]
        words = f"{state.newest['step']}/{state.steps or '?'}, {format_count(tokens)}"
        if state.tokens:
            words += f" of {format_count(state.tokens)} tokens, {tokens / state.tokens:.1%}"
        if room < len(words) + 14 or not state.tokens:
            return words
        bar = Table.grid(padding=(0, 1))
        wide = min(30, room - len(words) - 2)
        bar.add_row(words, ProgressBar(total=state.tokens, completed=tokens, width=wide))
        return bar

    def _speed(self) -> Iterator[str]:
        record = self._state.newest
        if self._state.rate:
            yield f"{format_count(self._state.rate)} tokens/s"
        if record.get("mfu") is not None:
            yield f"MFU {record['mfu']:.1%}"
        elif record.get("tflops_per_device"):
            yield f"{record['tflops_per_device']:.3g} TFLOP/s a device"
        yield f"memory {record['memory_gib']:.1f} GiB"

    def _time(self) -> Iterator[str]:
        if self._state.eta_seconds is not None:
            yield f"ETA {format_duration(self._state.eta_seconds)}"
        seconds = self._state.newest["seconds"]
        yield f"step {seconds['step']:.3g} s"
        parts = [name for name in _PARTS if name in seconds]
        if "forward" in parts or "graph" in parts:
            parts.remove("forward_backward")
        for name in parts:
            share = seconds[name] / (seconds["step"] or 1.0)
            if share >= 0.005:
                yield f"{name.replace('_', ' ')} {share:.0%}"

    def _checkpoint(self) -> Iterator[str]:
        saved = self._state.checkpoint
        if not saved:
            yield "none yet"
            return
        age = format_duration(time.time() - saved["time"])
        yield f"step {saved['step']}, {age} ago"
        yield f"the loop stood {saved['stall_seconds']:.2f} s"
        yield f"writing {saved['write_seconds']:.2f} s"
        yield f"publishing {saved['commit_seconds']:.2f} s"

    def _validations(self) -> Iterator[str]:
        steps = {record["step"] for record in self._state.validations.values()}
        for length, record in sorted(self._state.validations.items()):
            yield f"{record['loss']:.4f} at {length} tokens"
        yield f"step {max(steps)}"

    def _faults(self) -> Text:
        if not self._state.faults:
            resumed = self._state.resumed_after
            return Text(
                "none" if resumed is None else f"none since step {resumed}, where it resumed"
            )
        counts = ", ".join(f"{count} {kind}" for kind, count in self._state.faults.items())
        return Text(f"{counts}; {self._state.newest_fault}", style="yellow")


def _joined(parts: Iterator[str], room: int) -> str:
    """As many parts as there is room for; the first always."""
    line = next(parts, "")
    for part in parts:
        if len(line) + len(part) + 3 > room:
            break
        line += f" · {part}"
    return line
