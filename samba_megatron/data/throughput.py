"""Live progress of a long read: megabytes and tokens a second, documents, time left.

A terminal gets a moving line; anything else (a log file, a batch job) gets a plain line now and
then. Both go to stderr.
"""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

_PLAIN_INTERVAL_S = 10.0


class ThroughputDisplay:
    """Shows how far a read of ``total_bytes`` has come."""

    def __init__(self, total_bytes: int) -> None:
        self._total = max(total_bytes, 1)
        self._start = time.monotonic()
        self._last_line = self._start
        self._progress: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TimeRemainingColumn(compact=True),
                console=console,
            )
            self._task = self._progress.add_task("starting", total=self._total)

    def __enter__(self) -> Self:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress:
            self._progress.stop()

    def update(self, done_bytes: int, read_bytes: int, documents: int, tokens: int) -> None:
        """Reports the state so far.

        Args:
            done_bytes: bytes of the input files behind us, out of the total.
            read_bytes: bytes of text lines processed (more than ``done_bytes`` if compressed).
            documents: documents written.
            tokens: tokens written.
        """
        seconds = max(time.monotonic() - self._start, 1e-9)
        rates = (
            f"{read_bytes / 1e6 / seconds:.1f} MB/s, {tokens / 1e6 / seconds:.2f}M tokens/s, "
            f"{documents:,} documents"
        )
        if self._progress:
            self._progress.update(self._task, completed=done_bytes, description=rates)
        elif time.monotonic() - self._last_line >= _PLAIN_INTERVAL_S:
            self._last_line = time.monotonic()
            left = seconds * (self._total - done_bytes) / max(done_bytes, 1)
            print(
                f"{100 * done_bytes / self._total:.0f} %: {rates}, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
