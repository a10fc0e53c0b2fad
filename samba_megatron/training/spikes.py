"""Which steps are not taken: those whose loss or gradient norm is an outlier, or is not finite.

A batch that spikes the loss can throw a run off its course for thousands of steps, so it is judged
before the weights change, by numbers that the step has anyway. An outlier lies many robust standard
deviations (median and median absolute deviation) above what the last steps had. What is usual is
part of the run's state: a resumed run judges as the uninterrupted one would have.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from samba_megatron.config import FaultsConfig

_GAUSSIAN = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""
_LEAST_SCATTER = 0.005
"""A run can be smoother than that; a few percent above the usual is no spike for it either."""


@dataclass
class Memory:
    """What the guard remembers, in every checkpoint; JSON."""

    losses: list[float]
    grad_norms: list[float]
    in_row: int = 0
    """Skipped steps since the last that was taken."""
    skipped_steps: int = 0
    rollbacks: int = 0


class SkippedStep(Exception):
    """A step was not taken, on every rank; no weight has changed.

    Attributes say what it came to; ``loss`` and ``grad_norm`` are None where they are not finite,
    and the latter where the loss alone decided.
    """

    def __init__(self, reason: str, loss: float, grad_norm: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.loss = loss if math.isfinite(loss) else None
        self.grad_norm = grad_norm if grad_norm is not None and math.isfinite(grad_norm) else None


class SpikeGuard:
    """Judges steps by those before.

    Args:
        faults: the limits.
        saved: what :meth:`state` gave in a checkpoint; {} at the start of a run.
    """

    def __init__(self, faults: FaultsConfig, saved: dict[str, Any]) -> None:
        self._faults = faults
        self.memory = Memory(**saved) if saved else Memory([], [])
        self._loss = math.nan

    def state(self) -> dict[str, Any]:
        """For the checkpoint; a copy."""
        content = dict(vars(self.memory))
        return {**content, "losses": [*self.memory.losses], "grad_norms": [*self.memory.grad_norms]}

    def odd_loss(self, loss: float) -> str | None:
        """What is wrong with a finite loss, if anything."""
        self._loss = loss
        return self._outlier("the loss", loss, self.memory.losses)

    def check_grad_norm(self, norm: float) -> None:
        """Called between the norm's computation and the update.

        Raises:
            SkippedStep: the norm is an outlier, or not finite. It is one all-reduced number, the
                same on every rank, and so is the judgement.
        """
        if not math.isfinite(norm):
            raise SkippedStep(f"the gradient norm is {norm}", self._loss, norm)
        reason = self._outlier("the gradient norm", norm, self.memory.grad_norms)
        if reason is not None:
            raise SkippedStep(reason, self._loss, norm)

    def taken(self, loss: float, grad_norm: float) -> None:
        """A step was taken: it tells what is usual."""
        for values, value in (
            (self.memory.losses, loss),
            (self.memory.grad_norms, grad_norm),
        ):
            values.append(value)
            del values[: -self._faults.spike_window]
        self.memory.in_row = 0

    def skipped(self) -> None:
        """A step was not taken."""
        self.memory.in_row += 1
        self.memory.skipped_steps += 1

    @property
    def is_over_budget(self) -> bool:
        """Whether more steps were skipped than the run may skip."""
        return self.memory.skipped_steps > self._faults.max_skipped_steps

    @property
    def wants_rollback(self) -> bool:
        """Whether skipping did not help."""
        return self.memory.in_row >= self._faults.max_skips_in_row

    @property
    def may_roll_back(self) -> bool:
        """Whether the budget of rollbacks is not used up."""
        return self.memory.rollbacks < self._faults.max_rollbacks

    def rolled_back(self, before: Memory) -> None:
        """The run is back at an older checkpoint, whose memory this is; what is spent stays so.

        Args:
            before: the memory at the moment of going back.
        """
        self.memory.in_row = 0
        self.memory.skipped_steps = before.skipped_steps
        self.memory.rollbacks = before.rollbacks + 1

    def _outlier(self, name: str, value: float, usual: list[float]) -> str | None:
        if len(usual) < self._faults.spike_window // 2:
            return None
        middle = statistics.median(usual)
        deviation = statistics.median(abs(number - middle) for number in usual)
        scatter = max(_GAUSSIAN * deviation, _LEAST_SCATTER * abs(middle))
        if scatter <= 0 or value <= middle + self._faults.spike_zscore * scatter:
            return None
        score = (value - middle) / scatter
        return f"{name} {value:.4g} is {score:.1f} standard deviations above the usual {middle:.4g}"


class GradNorm:
    """The gradient norm of the newest step, before clipping: read from the device before the
    update, so that nobody waits for that.

    Args:
        optimizer: whose method ``name`` is looked at.
    """

    def __init__(self, optimizer: Any, name: str) -> None:
        self.value = 0.0
        self._optimizer, self._name = optimizer, name

    def release(self) -> None:
        """Lets the optimizer go, which would hold itself by its method."""
        vars(self._optimizer).pop(self._name, None)


def watch_grad_norm(optimizer: Any, check: Callable[[float], None] | None = None) -> GradNorm:
    """Notes the gradient norm before megatron's optimizer changes a weight.

    Its ``step`` computes the norm for clipping, after the reduction; an exception there leaves the
    weights and its state as they are.

    Args:
        optimizer: megatron's, a single or a chained one. With ``clip_grad`` 0 a single one computes
            no norm: it stays 0.
        check: called with it; may raise.
    """
    name = "get_grad_norm" if hasattr(optimizer, "chained_optimizers") else "clip_grad_norm"
    compute, found = getattr(optimizer, name), GradNorm(optimizer, name)

    def checked(*args: Any) -> Any:
        norm = compute(*args)
        found.value = float(norm)
        if check is not None:
            check(found.value)
        return norm

    setattr(optimizer, name, checked)
    return found
