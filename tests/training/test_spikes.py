"""What counts as an outlier, on numbers like a run's."""

import math
import random
from typing import Any

import pytest

from samba_megatron.config import FaultsConfig
from samba_megatron.training.spikes import SkippedStep, SpikeGuard, watch_grad_norm


def guard_after(steps: int, saved: dict[str, Any] | None = None) -> SpikeGuard:
    """A run whose loss falls slowly and whose gradient norm has a long tail."""
    numbers, guard = random.Random(3), SpikeGuard(FaultsConfig(), saved or {})
    for step in range(steps):
        loss = 3.0 + 4.0 / (1 + step / 50) + numbers.gauss(0, 0.02)
        assert guard.odd_loss(loss) is None, step
        norm = math.exp(numbers.gauss(-1, 0.2))
        guard.check_grad_norm(norm)
        guard.taken(loss, norm)
    return guard


def test_what_is_usual_passes_and_a_spike_does_not() -> None:
    guard = guard_after(2000)
    assert guard.odd_loss(3.2) is None
    reason = guard.odd_loss(4.5)
    assert reason is not None and reason.startswith("the loss 4.5 is ")
    assert guard.odd_loss(0.1) is None, "a low loss is no spike"
    guard.check_grad_norm(0.6)
    with pytest.raises(SkippedStep, match="the gradient norm 20 is "):
        guard.check_grad_norm(20.0)


def test_nothing_is_an_outlier_before_half_a_window() -> None:
    guard = guard_after(63)
    assert guard.odd_loss(100.0) is None
    with pytest.raises(SkippedStep, match="the gradient norm is inf"):
        guard.check_grad_norm(math.inf)
    assert guard_after(64).odd_loss(100.0) is not None


def test_skipped_steps_do_not_become_usual() -> None:
    guard = guard_after(200)
    for _ in range(3):
        assert guard.odd_loss(9.0) is not None
        assert not guard.wants_rollback
        guard.skipped()
    assert guard.odd_loss(9.0) is not None
    guard.skipped()
    assert guard.wants_rollback and guard.may_roll_back and not guard.is_over_budget
    guard.taken(3.1, 0.3)
    assert not guard.wants_rollback and guard.memory.skipped_steps == 4


def test_a_resumed_guard_judges_alike() -> None:
    whole = guard_after(300)
    again = SpikeGuard(FaultsConfig(), whole.state())
    whole.taken(9.0, 9.0)  # the state that was saved is not the living one
    assert len(again.memory.losses) == FaultsConfig().spike_window
    assert again.odd_loss(9.0) == guard_after(300).odd_loss(9.0) is not None
    again.rolled_back(whole.memory)
    assert (again.memory.rollbacks, again.memory.in_row) == (1, 0)


def test_a_run_without_any_scatter_has_outliers_too() -> None:
    guard = SpikeGuard(FaultsConfig(), {})
    for _ in range(100):
        guard.taken(2.0, 0.0)
    assert guard.odd_loss(2.05) is None
    assert guard.odd_loss(2.5) is not None
    guard.check_grad_norm(0.0)


class Single:
    """An optimizer as megatron's: the norm, then the update."""

    def __init__(self) -> None:
        self.updates = 0

    def clip_grad_norm(self, clip: float) -> float:
        return 10 * clip

    def step(self) -> float:
        norm = self.clip_grad_norm(1.0)
        self.updates += 1
        return norm


def test_the_norm_is_seen_before_the_update() -> None:
    optimizer, seen = Single(), list[float]()
    norm = watch_grad_norm(optimizer, seen.append)
    assert optimizer.step() == 10.0 and seen == [10.0] and norm.value == 10.0

    def refuse(norm: float) -> None:
        raise SkippedStep("too large", 1.0, norm)

    watch_grad_norm(optimizer, refuse)
    with pytest.raises(SkippedStep):
        optimizer.step()
    assert optimizer.updates == 1
