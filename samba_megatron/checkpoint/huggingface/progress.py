"""How far a conversion is, and how long it will take."""

import sys
import time


class ByteProgress:
    """Prints a line about bytes done; on a terminal one line that changes, else now and then."""

    _TERMINAL_SECONDS, _PLAIN_SECONDS = 0.2, 10.0

    def __init__(self, verb: str, total: int) -> None:
        """Args:
        verb: what is being done, as in "writing".
        total: bytes in all.
        """
        self._verb, self._total, self._done = verb, max(total, 1), 0
        self._started = self._last = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def add(self, count: int) -> None:
        """``count`` bytes more are done."""
        self._done += count
        now = time.monotonic()
        pause = self._TERMINAL_SECONDS if self._terminal else self._PLAIN_SECONDS
        if now - self._last >= pause:
            self._last = now
            self._print(now)

    def close(self) -> float:
        """Ends the line.

        Returns:
            Seconds since the start.
        """
        now = time.monotonic()
        if self._terminal:
            self._print(now)
            print(file=sys.stderr)
        return now - self._started

    def _print(self, now: float) -> None:
        rate = self._done / max(now - self._started, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-9)
        text = (
            f"{self._verb} {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB "
            f"({100 * self._done / self._total:.0f} %), {rate / 1e6:.0f} MB/s, {left:.0f} s left"
        )
        end = "" if self._terminal else "\n"
        print(("\r\033[K" if self._terminal else "") + text, end=end, file=sys.stderr, flush=True)
