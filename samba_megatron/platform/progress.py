"""How far a long piece of work is, and how long it will take."""

import math
import sys
import time
from collections.abc import Callable

_TERMINAL_SECONDS, _PLAIN_SECONDS = 0.2, 10.0


class Progress:
    """Says on stderr what is done; on a terminal in one line that changes, else now and then, and
    when all is done."""

    def __init__(self, total: int, describe: Callable[[int, float], str], at_once: bool = False):
        """Args:
        total: how much there is to do, in whatever unit.
        describe: from what is done and how much of it a second, the line's text; the seconds that
            are left follow it.
        at_once: the first that is done has a line, however soon.
        """
        self._total, self._describe, self._done = max(total, 1), describe, 0
        self._started = time.monotonic()
        self._last = -math.inf if at_once else self._started
        self._terminal = sys.stderr.isatty()

    def add(self, count: int) -> None:
        """``count`` more are done."""
        self._done += count
        now = time.monotonic()
        pause = _TERMINAL_SECONDS if self._terminal else _PLAIN_SECONDS
        if self._done >= self._total or now - self._last >= pause:
            self._last = now
            self._print(now)

    def close(self) -> float:
        """Ends the line, also where not all is done.

        Returns:
            Seconds since the start.
        """
        now = time.monotonic()
        if self._terminal and 0 < self._done < self._total:
            print(file=sys.stderr)
        return now - self._started

    def _print(self, now: float) -> None:
        rate = self._done / max(now - self._started, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        text = f"{self._describe(self._done, rate)}, {left:,.0f} s left"
        start = "\r\033[K" if self._terminal else ""
        end = "" if self._terminal and self._done < self._total else "\n"
        print(start + text, end=end, file=sys.stderr, flush=True)


def byte_progress(verb: str, total: int) -> Progress:
    """Of ``total`` bytes; ``verb`` says what is being done, as in "writing"."""

    def describe(done: int, rate: float) -> str:
        share = f"{done / 1e9:.2f} of {total / 1e9:.2f} GB ({100 * done / max(total, 1):.0f} %)"
        return f"{verb} {share}, {rate / 1e6:.0f} MB/s"

    return Progress(total, describe)
