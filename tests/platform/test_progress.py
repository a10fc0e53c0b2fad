"""Lines about work: soon enough on a terminal, seldom elsewhere, and always when all is done."""

import io

import pytest

from samba_megatron.platform import progress
from samba_megatron.platform.progress import Progress, byte_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is: its only number."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_elsewhere_a_line_now_and_then(clock, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr", out := io.StringIO())
    lines = byte_progress("copying", 4_000_000_000)
    for seconds in (1, 11, 12, 20):
        clock[0] = 100 + seconds
        lines.add(1_000_000_000)
    assert lines.close() == 20
    assert out.getvalue() == (
        "copying 2.00 of 4.00 GB (50 %), 182 MB/s, 11 s left\n"
        "copying 4.00 of 4.00 GB (100 %), 200 MB/s, 0 s left\n"
    )


def test_the_first_at_once_where_each_takes_long(clock, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr", out := io.StringIO())
    lines = Progress(3, lambda done, rate: f"{done} cases", at_once=True)
    clock[0] += 2
    lines.add(1)
    lines.close()
    assert out.getvalue() == "1 cases, 4 s left\n"


def test_on_a_terminal_one_line_that_ends(clock, monkeypatch) -> None:
    monkeypatch.setattr("sys.stderr", out := Terminal())
    whole, part = (Progress(2, lambda done, rate: f"{done}") for _ in range(2))
    for lines, steps in ((whole, 2), (part, 1)):
        for _ in range(steps):
            clock[0] += 1
            lines.add(1)
        lines.close()
    shown = out.getvalue().replace("\r\033[K", "|")
    assert shown == "|1, 1 s left|2, 0 s left\n|1, 3 s left\n"
