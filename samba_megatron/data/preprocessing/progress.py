"""Live progress: megabytes and tokens a second, documents, shards, time left.

The tasks, wherever they run, leave notes in the workspace; a thread of the command reads them. A
terminal gets a moving line; anything else (a log file, a batch job) gets a plain line now and then.
Both go to stderr.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from samba_megatron.data.preprocessing.shard_writer import Job

_LOOK_EVERY_S = 0.5
_PLAIN_INTERVAL_S = 10.0


@contextmanager
def watched(job: Job, shards_kept: int) -> Iterator[None]:
    """Shows how a job's shards get on while the block runs."""
    watcher = _Watcher(job, shards_kept)
    thread = threading.Timer(_LOOK_EVERY_S, watcher.run)
    thread.daemon = True
    thread.start()
    try:
        yield
    finally:
        watcher.stop.set()
        thread.cancel()
        thread.join()


class _Watcher:
    """Reads the notes and shows their sum."""

    def __init__(self, job: Job, shards_kept: int) -> None:
        self.stop = threading.Event()
        self._job = job
        done = [s.number for s in job.shards if job.workspace.read_record(s.number)]
        self._open = [s for s in job.shards if s.number not in set(done)]
        self._kept = shards_kept
        self._total = max(sum(shard.raw_bytes for shard in self._open), 1)
        self._finished: dict[int, tuple[int, int, int, int]] = {}
        self._started = time.monotonic()
        self._said = self._started
        self._stream: TextIO = sys.stderr

    def run(self) -> None:
        """Shows progress until it is stopped."""
        if not self._stream.isatty():
            while not self.stop.wait(_LOOK_EVERY_S):
                if time.monotonic() - self._said >= _PLAIN_INTERVAL_S:
                    self._said = time.monotonic()
                    done, text, left = self._look()
                    print(f"{done:.0%}: {text}, {left}", file=self._stream, flush=True)
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        columns = (SpinnerColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"))
        progress = Progress(
            *columns,
            console=Console(file=self._stream),
            redirect_stdout=False,  # workers are forked meanwhile
            redirect_stderr=False,
        )
        with progress:
            task = progress.add_task("starting", total=1.0)
            while not self.stop.wait(_LOOK_EVERY_S):
                done, text, left = self._look()
                progress.update(task, completed=done, description=f"{done:.0%} {text}, {left}")

    def _look(self) -> tuple[float, str, str]:
        """The part that is done, rates and counts in words, and the time left in words."""
        begun = [s for s in self._open if s.number not in self._finished]
        notes = self._job.workspace.progress(s.number for s in begun)
        for shard in begun:
            if shard.number in notes and self._job.workspace.read_record(shard.number):
                self._finished[shard.number] = (shard.raw_bytes, *notes[shard.number][1:])
        sums = [0, 0, 0, 0]
        for counts in (notes | self._finished).values():
            sums = [total + count for total, count in zip(sums, counts, strict=True)]
        raw, read, documents, tokens = sums
        seconds = max(time.monotonic() - self._started, 1e-9)
        done = min(raw / self._total, 1.0)
        shards = f"{len(self._finished) + self._kept}/{len(self._job.shards)} shards"
        text = (
            f"{read / 1e6 / seconds:.1f} MB/s, {tokens / 1e6 / seconds:.2f}M tokens/s, "
            f"{documents:,} documents, {shards}"
        )
        left = seconds * (1 - done) / done if done else 0.0
        return done, text, f"{in_words(left)} left" if done else "reading"


def in_words(seconds: float) -> str:
    """A duration: 42 s, 5 min 10 s, 3 h 20 min, 2.5 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    if seconds < 172_800:
        return f"{seconds // 3600:.0f} h {seconds % 3600 / 60:.0f} min"
    return f"{seconds / 86_400:.1f} days"
