"""What people see while a run goes on: a live line on a terminal, plain lines elsewhere.

The plain lines also go to ``log.txt`` in the run folder, whatever the terminal shows.
"""

import sys
import time
from pathlib import Path
from typing import IO, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


def format_count(number: float) -> str:
    """1234567 → ``1.23M``; K, M, B, T."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def format_duration(seconds: float) -> str:
    """3725 → ``1h02m``; 62 → ``1m02s``; with days where there are some."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{seconds:.1f}s"


class RunConsole:
    """The voice of a run; only rank 0 speaks.

    Args:
        run_dir: where ``log.txt`` goes.
        speaks: whether this process is the one that speaks.
        progress: live, plain, or by whether standard output is a terminal.
    """

    def __init__(
        self, run_dir: Path, speaks: bool, progress: Literal["auto", "live", "plain"] = "auto"
    ) -> None:
        self._speaks = speaks
        self._log: IO[str] | None = None
        self._live: Progress | None = None
        self._console = Console(soft_wrap=True, highlight=False)
        if speaks:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._log = open(run_dir / "log.txt", "a", encoding="utf-8")  # noqa: SIM115
        self._use_live = speaks and (
            progress == "live" or (progress == "auto" and sys.stdout.isatty())
        )

    def say(self, text: str) -> None:
        """One line, to the terminal and the log."""
        self._to_log(text)
        if self._speaks:
            (self._live.console if self._live else self._console).print(text, markup=False)

    def warn(self, text: str) -> None:
        """A line that must not be overlooked."""
        self._to_log(f"WARNING: {text}")
        if self._speaks:
            console = self._live.console if self._live else self._console
            console.print(f"WARNING: {text}", style="bold yellow", markup=False)

    def facts(self, title: str, rows: list[tuple[str, str]]) -> None:
        """A small table of what a run is."""
        for name, value in rows:
            self._to_log(f"{title}: {name}: {value}" if name else f"{title}: {value}")
        if self._speaks:
            table = Table(title=title, show_header=False, title_justify="left", box=None)
            for name, value in rows:
                table.add_row(f"  {name}", value)
            self._console.print(table)

    def start(self, first_step: int, steps: int) -> None:
        """Training begins."""
        if not self._use_live:
            return
        self._live = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[line]}"),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._task = self._live.add_task("train", total=steps, completed=first_step, line="")
        self._live.start()

    def step(self, record: dict[str, Any], steps: int, eta_seconds: float) -> None:
        """A training step is done."""
        line = _line(record, eta_seconds)
        self._to_log(f"step {record['step']}/{steps} {line}")
        if self._live:
            self._live.update(self._task, completed=record["step"], line=line)
        elif self._speaks:
            self._console.print(f"step {record['step']}/{steps} {line}", markup=False)

    def stop(self) -> None:
        """Training ends: the live line stays as it is."""
        if self._live:
            self._live.stop()
            self._live = None

    def _to_log(self, text: str) -> None:
        if self._log:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._log.flush()


def _line(record: dict[str, Any], eta_seconds: float) -> str:
    parts = [
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.2e}",
        f"grad {record['grad_norm']:.3f}",
        f"{format_count(record['tokens'])} tokens",
        f"{format_count(record['tokens_per_second'])} tok/s",
    ]
    if record.get("mfu") is not None:
        parts.append(f"MFU {100 * record['mfu']:.1f}%")
    parts += [f"{record['memory_gib']:.1f} GiB", f"ETA {format_duration(eta_seconds)}"]
    return " | ".join(parts)
