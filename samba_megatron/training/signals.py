"""Requests to stop: signals, a file named ``stop`` in the run folder, the time. The loop obeys
after the step in progress.

A signal's handler only sets a flag. What any rank was asked is settled by an all-reduce, because
Slurm's signal reaches the ranks at different moments, or only some of them; the file is looked for
by rank 0 alone. The all-reduce is the one that judges a step's loss: one more between steps would
have the host wait for the update, and the device then for the host. What comes during the update
is obeyed a step later.
"""

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from samba_megatron.platform import distributed
from samba_megatron.platform.errors import UserError
from samba_megatron.platform.exits import ExitCode
from samba_megatron.tracking.ledger import Cause

STOP_FILE = "stop"
_SECONDS_BETWEEN_LOOKS = 2.0
_TIME_IS_OVER, _STOP_FILE_IS_THERE = 1000, 1001  # beyond the numbers of signals


@dataclass(frozen=True)
class Stop:
    """An end of the loop."""

    code: ExitCode
    cause: Cause | None
    """For the ledger; None where only the scheduler knows it."""
    reason: str
    """For people."""
    bad_node: str | None = None
    """To be excluded from the next start."""


class StopRequest:
    """Remembers the first signal received of those named, and knows what else may ask for a stop.

    Raises:
        UserError: if a name is no signal's.
    """

    def __init__(self, names: list[str]) -> None:
        self.received: int | None = None
        self.agreed = 0
        """The largest wish of all ranks when they last told each other; the same on all."""
        self._file: Path | None = None
        self._limit_minutes: float | None = None
        self._started = self._looked = time.monotonic()
        self._file_is_there = False
        for name in names:
            number = getattr(signal, name, None)
            if number is None:
                raise UserError(
                    f"training.exit_signals names {name!r}, which is no signal here: use names "
                    "such as SIGTERM or SIGUSR1"
                )
            signal.signal(number, self._remember)

    def begin(self, run_dir: Path, is_first_rank: bool, limit_minutes: float | None) -> None:
        """The loop begins: the clock starts, and on the first rank the file counts."""
        self._file = run_dir / STOP_FILE if is_first_rank else None
        self._limit_minutes = limit_minutes
        self._started = time.monotonic()
        self._looked = float("-inf")

    def wish(self) -> int:
        """What this rank was asked: 0 for nothing; the largest over the ranks is obeyed."""
        if self._sees_the_file():
            return _STOP_FILE_IS_THERE
        minutes = (time.monotonic() - self._started) / 60
        if self._limit_minutes is not None and minutes >= self._limit_minutes:
            return _TIME_IS_OVER
        return self.received or 0

    def agree(self) -> None:
        """The ranks tell each other now, as they do in every step; every rank calls it."""
        self.agreed = distributed.largest(self.wish())

    def obeyed(self) -> None:
        """The state is saved: the file goes, so that the next start is not stopped by it."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def explain(self) -> Stop | None:
        """The end that the ranks have agreed on, if any."""
        wish = self.agreed
        if wish == 0:
            return None
        if wish == _STOP_FILE_IS_THERE:
            reason = f"a file named {STOP_FILE} was found in the run folder"
            return Stop(ExitCode.REQUEUE, Cause.USER_STOP, reason)
        if wish == _TIME_IS_OVER:
            reason = f"training.exit_duration_minutes {self._limit_minutes} is over"
            return Stop(ExitCode.REQUEUE, Cause.TIME_LIMIT, reason)
        return Stop(ExitCode.REQUEUE, None, f"signal {signal.Signals(wish).name} was received")

    def _sees_the_file(self) -> bool:
        now = time.monotonic()
        if self._file is not None and now - self._looked >= _SECONDS_BETWEEN_LOOKS:
            self._looked = now
            self._file_is_there = self._file.exists()
        return self._file_is_there

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
