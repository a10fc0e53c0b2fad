"""Time from step to step, by a clock that stands still unless told otherwise."""

import pytest

from samba_megatron.training import timing


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch):
    """Lets so many seconds pass."""
    now = [100.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_a_step_lasts_from_the_end_of_the_one_before(passes) -> None:
    clock = timing.StepClock()
    passes(5)  # before the first step
    clock.begin()
    passes(2)
    assert clock.end(0.0) == 2
    passes(1)
    clock.begin()
    passes(2)
    assert clock.end(0.0) == 3, "what the host did in between is the second step's"
    passes(4)
    clock.begin()
    passes(2)
    assert clock.end(3.0) == 3, "a stall is not"


def test_what_is_no_part_of_a_step_is_not_timed(passes) -> None:
    clock = timing.StepClock()
    clock.begin()
    clock.end(0.0)
    passes(60)  # a validation, a save of which the loop stood 50
    clock.interrupt()
    passes(1)
    clock.begin()
    passes(2)
    assert clock.end(50.0) == 2
