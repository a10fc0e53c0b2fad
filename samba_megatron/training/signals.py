"""Signals ask the run to stop; the loop obeys after the step in progress.

The handler only sets a flag. Whether any rank was asked is settled by an all-reduce between
steps, because Slurm's signal reaches the ranks at different moments, or only some of them.
"""

import signal
from types import FrameType

from samba_megatron.platform.errors import UserError


class StopRequest:
    """Remembers the first signal received of those named."""

    def __init__(self, names: list[str]) -> None:
        self.received: str | None = None
        for name in names:
            number = getattr(signal, name, None)
            if number is None:
                raise UserError(
                    f"training.exit_signals names {name!r}, which is no signal here: use names "
                    "such as SIGTERM or SIGUSR1"
                )
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number).name
