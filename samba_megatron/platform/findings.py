"""What the doctor says of one thing: its state, what that means, and the command that mends it.

Only the standard library: a machine is looked at before anything is known to work on it.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """How a thing is, for training on this machine."""

    OK = "ok"
    """It is there and works."""
    OFF = "off"
    """It is not there, and nothing here needs it."""
    POOR = "poor"
    """Training works without it, or as it is, but slower or with less room."""
    BROKEN = "broken"
    """Training here fails, or computes wrongly, until it is mended."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    area: str
    """``packages``, ``machine``, ``kernels``, …"""
    name: str
    state: State
    found: str
    """Version, size, or the reason why it does not work."""
    meaning: str = ""
    """What it enables, or what its lack costs."""
    fix: str = ""
    """A command, where there is something to mend."""
    figures: dict[str, Any] = field(default_factory=dict)
    """What was measured, by name with its unit."""


Probe = Callable[[], Finding]


def look(area: str, probes: Iterable[tuple[str, Probe]]) -> Iterator[Finding]:
    """Runs each probe; one that fails becomes a finding itself, and the others go on.

    Args:
        area: where a failed probe is listed.
        probes: what each looks at, and how.
    """
    for name, probe in probes:
        try:
            yield probe()
        except Exception as error:
            reason = f"could not be looked at: {first_line(error)}"
            yield Finding(area, name, State.POOR, reason)


def first_line(error: BaseException) -> str:
    """The error's kind and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
