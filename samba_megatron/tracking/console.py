"""What people see while a run goes on: a live panel on a terminal, plain lines elsewhere.

The plain lines also go to ``log.txt`` in the run folder, whatever the terminal shows.
"""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

from rich.console import Console
from rich.table import Table

from samba_megatron.tracking.numbers import format_count, format_duration
from samba_megatron.tracking.panel import Panel, RunState


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
        self._speaks, self._name = speaks, run_dir.name
        self._log: IO[str] | None = None
        self._state = RunState()
        self._panel: Panel | None = None
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
            self._console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """A line that must not be overlooked."""
        self._to_log(f"WARNING: {text}")
        if self._speaks:
            self._console.print(f"WARNING: {text}", style="bold yellow", markup=False)

    def facts(self, title: str, rows: list[tuple[str, str]]) -> None:
        """A small table of what a run is."""
        for name, value in rows:
            self._to_log(f"{title}: {name}: {value}" if name else f"{title}: {value}")
        if self._speaks:
            table = Table(title=title, show_header=False, title_justify="left", box=None)
            for name, value in rows:
                table.add_row(f"  {name}", value)
            self._console.print(table)

    def start(self, steps: int) -> None:
        """Training begins."""
        if self._use_live:
            self._state.steps = self._state.steps or steps
            self._panel = Panel(self._console, self._state, self._name)
            self._on_panel(Panel.start)

    def hear(self, record: dict[str, Any]) -> None:
        """A record was written to ``metrics.jsonl``: the panel shows what it says."""
        if not self._use_live:
            return
        try:
            self._state.hear(record)
        except Exception as error:
            self._give_up_panel(error)
        self._on_panel(Panel.draw)

    def step(self, record: dict[str, Any], steps: int, eta_seconds: float) -> None:
        """A training step is done."""
        line = _line(record, eta_seconds)
        self._to_log(f"step {record['step']}/{steps} {line}")
        if self._panel is None and self._speaks:
            self._console.print(f"step {record['step']}/{steps} {line}", markup=False)

    def stop(self) -> None:
        """Training ends: the panel stays on the screen as it is."""
        self._on_panel(Panel.stop)
        self._panel = None

    def _on_panel(self, act: Callable[[Panel], None]) -> None:
        """Whatever goes wrong in the panel ends the panel, not the run."""
        if self._panel is None:
            return
        try:
            act(self._panel)
        except Exception as error:
            self._give_up_panel(error)

    def _give_up_panel(self, error: Exception) -> None:
        panel, self._panel, self._use_live = self._panel, None, False
        if panel is not None:
            with suppress(Exception):
                panel.abandon()
        self.warn(f"the live panel failed ({type(error).__name__}: {error}): plain lines follow")

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
