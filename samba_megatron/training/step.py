"""One optimizer step: forward and backward over the micro-batches, checks, update."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.rerun_state_machine import (
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    RerunDataIterator,
    RerunMode,
    RerunState,
    destroy_rerun_state_machine,
    get_rerun_state_machine,
    initialize_rerun_state_machine,
)
from torch import Tensor

from samba_megatron.data.stream import Batch
from samba_megatron.platform import distributed
from samba_megatron.platform.exits import ExitCode
from samba_megatron.platform.hardware import node_name
from samba_megatron.training import nonfinite
from samba_megatron.training.schedule import Reports, Schedule, mean_loss, run_schedule
from samba_megatron.training.spikes import GradNorm, SkippedStep, SpikeGuard
from samba_megatron.training.timing import StepTimers, Stopwatch

if TYPE_CHECKING:
    from samba_megatron.training.signals import StopRequest


@dataclass
class StepResult:
    """What a step came to, the same on every rank."""

    loss: float
    """Mean cross-entropy a token, nats."""
    grad_norm: float
    """Global gradient norm before clipping."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of the parts."""


def gradients_are_finite(chunks: "Sequence[Any]") -> Tensor:
    """Boolean scalar: whether every number in this rank's gradient buffers is finite."""
    norms = [
        torch.linalg.vector_norm(buffer.grad_data, dtype=torch.float32)
        for chunk in chunks
        for buffer in chunk.buffers
        if buffer.grad_data.numel()
    ]
    return torch.stack(norms).isfinite().all()


class NonFiniteStep(Exception):
    """The loss or a gradient of a step is not finite, or too many were outliers; no weight has
    changed.

    ``code`` is HOLD where the same step gives the same again (mathematics or data: a person must
    look) and BAD_NODE where it does not (the device cannot be trusted).
    """

    def __init__(self, code: ExitCode, reason: str, node: str | None = None) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.node = node
        """The one that is not to be trusted, where it is known."""


def train_step(
    chunks: "Sequence[Any]",
    optimizer: Any,
    batches: list[Batch | None],
    sequence_length: int,
    micro_batch_size: int,
    grad_norm: GradNorm,
    guard: SpikeGuard | None = None,
    stop: "StopRequest | None" = None,
    timers: StepTimers | None = None,
    before_update: Callable[[], None] | None = None,
    schedule: Schedule = run_schedule,
) -> StepResult:
    """Forward, backward, check, update.

    Args:
        chunks: this rank's model chunks in megatron's DDP wrapper.
        optimizer: megatron's.
        batches: this rank's micro-batches; None on stages that read none.
        sequence_length: tokens of a sequence.
        micro_batch_size: sequences of a micro-batch.
        grad_norm: what the optimizer computes (:func:`watch_grad_norm`).
        guard: judges the loss.
        stop: the ranks agree on it while they judge.
        timers: those of the chunks' schedules (:func:`attach_timers`), for the parts' times.
        before_update: called on every rank when the gradients are whole and judged.
        schedule: what computes the gradients.

    Raises:
        NonFiniteStep: before any weight has changed.
        SkippedStep: likewise, where there is a guard.
    """
    watch = Stopwatch()
    with watch.measure("forward_backward"), timers.step() if timers else nullcontext():
        loss = _forward_backward(
            chunks, optimizer, batches, sequence_length, micro_batch_size, guard, stop, schedule
        )
    # The device has just been waited for: reading its times costs nothing.
    parts = timers.read() if timers else {}
    if before_update is not None:
        before_update()
    with watch.measure("optimizer"), timers.update() if timers else nullcontext():
        updated, _, _ = optimizer.step()
    if not updated:
        raise NonFiniteStep(ExitCode.HOLD, "the optimizer refused the step")
    return StepResult(loss, grad_norm.value, watch.seconds | parts)


def _forward_backward(
    chunks: "Sequence[Any]",
    optimizer: Any,
    batches: list[Batch | None],
    sequence_length: int,
    micro_batch_size: int,
    guard: SpikeGuard | None,
    stop: "StopRequest | None",
    schedule: Schedule,
) -> float:
    """Gradients of one step in the buffers; its mean loss. Runs again where a rank's result is
    not finite and the rerun state machine wants to know whether that can be repeated."""
    iterators = [RerunDataIterator(iter(batches)) for _ in chunks]
    machine = get_rerun_state_machine()
    loss, finite, suspect = float("nan"), False, False
    while machine.should_run_forward_backward(iterators):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reports = schedule(chunks, iterators, len(batches), sequence_length, micro_batch_size)
        judged = torch.stack([mean_loss(reports), gradients_are_finite(chunks).double()])
        loss, gradients_finite = judged.tolist()  # the device is waited for, once
        finite = bool(gradients_finite) and math.isfinite(loss)
        suspect = suspect or not (finite or _are_finite(reports))
        if machine.get_mode() != RerunMode.DISABLED:
            machine.validate_result(
                result=torch.tensor(loss if finite else float("nan")),
                rejection_func=lambda result: bool(result.isnan().item()),
                message="loss and gradients are finite",
            )
    _, should_exit, code = machine.should_checkpoint_and_exit()
    if should_exit and code == EXIT_CODE_FAILED_ON_RESULT_VALIDATION:
        nodes = sorted(set(distributed.gather_text(node_name() if suspect else "")) - {""})
        where = f" (losses of {', '.join(nodes)})" if nodes else ""
        sentence = f"a non-finite loss or gradient{where} vanished when the step was run again"
        raise NonFiniteStep(ExitCode.BAD_NODE, sentence, nodes[0] if len(nodes) == 1 else None)

    # The machine judges no first step of a process, and none when it is disabled.
    def run_forward() -> Reports:
        again = [iter(batches) for _ in chunks]
        return run_schedule(
            chunks, again, len(batches), sequence_length, micro_batch_size, forward_only=True
        )

    _judge(loss, finite, guard, stop, partial(nonfinite.locate, chunks, run_forward))
    return loss


def _judge(
    loss: float,
    finite: bool,
    guard: SpikeGuard | None,
    stop: "StopRequest | None",
    locate: Callable[[], str],
) -> None:
    """Every rank learns the worst that any has found, and was asked, with one reduction."""
    odd = guard.odd_loss(loss) if guard is not None and finite else None
    own = 2 if not finite else 1 if odd else 0
    worst, wish = distributed.largest_each(own, stop.wish() if stop is not None else 0)
    if stop is not None:
        stop.agreed = wish
    if worst == 2:
        reason = f"the loss ({loss}) or a gradient is not finite; {locate()}"
        if guard is None:
            raise NonFiniteStep(ExitCode.HOLD, reason)
        _forget_rerun()
        raise SkippedStep(reason, loss)
    if worst == 1:
        raise SkippedStep(odd or "another rank takes the loss for an outlier", loss)


def _are_finite(reports: Reports) -> bool:
    return all(bool(report["loss"].isfinite().all()) for report in reports)


def _forget_rerun() -> None:
    """The rerun state machine wants a restart to judge what could be repeated: not if skipped."""
    machine = get_rerun_state_machine()
    if machine.state != RerunState.NOT_RUNNING_YET:
        mode = machine.get_mode()
        destroy_rerun_state_machine()
        initialize_rerun_state_machine(mode=mode)
        get_rerun_state_machine().first_iteration_complete = True
