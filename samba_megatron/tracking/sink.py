"""Where a run's records go besides the local file: what a tracking service must be able to do."""

from collections.abc import Iterable
from typing import Any, Protocol


class SinkUnavailable(Exception):
    """The service did not take the records; they are offered again later."""


class Sink(Protocol):
    """A tracking service that holds one run.

    Any call may raise :class:`SinkUnavailable`, and is then repeated as it was: a sink must take
    the same records twice without showing them twice.
    """

    def open(self, state: dict[str, Any], tags: dict[str, str], identity: str) -> dict[str, Any]:
        """Finds or makes the run.

        Args:
            state: what an earlier ``open`` returned; empty for a new run, and for one whose process
                was killed before it could note what the service had made.
            tags: what to say of the process that sends.
            identity: the run's own, the same in every call and no other run's: where ``state`` is
                empty, a run with it may be there already.

        Returns:
            What it takes to find the run again; JSON.
        """
        ...

    def parameters(self, values: dict[str, Any]) -> None:
        """The run's configuration, by dotted names; said once, and again on every resume."""
        ...

    def metrics(self, records: Iterable[tuple[int, float, dict[str, float]]]) -> None:
        """(step, seconds since the epoch, values by name), in order."""
        ...

    def close(self, exit_code: int) -> None:
        """One job of the run ended so."""
        ...
