"""One optimizer step: forward and backward over the micro-batches, checks, update."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import (
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    RerunDataIterator,
    RerunMode,
    RerunState,
    destroy_rerun_state_machine,
    get_rerun_state_machine,
    initialize_rerun_state_machine,
)
from megatron.core.utils import get_model_config
from torch import Tensor

from samba_megatron.config.data import DataConfig
from samba_megatron.data.stream import Batch, Piece
from samba_megatron.model.head import Losses, SummedLosses
from samba_megatron.model.sequence import SequenceParams, documents_apart, piece_of
from samba_megatron.ops.continued import Past
from samba_megatron.platform import distributed
from samba_megatron.platform.exits import ExitCode
from samba_megatron.platform.hardware import node_name
from samba_megatron.training import nonfinite
from samba_megatron.training.pieces import InPieces
from samba_megatron.training.spikes import SkippedStep, SpikeGuard
from samba_megatron.training.timing import StepTimers, Stopwatch

if TYPE_CHECKING:
    from torch import nn

    from samba_megatron.training.signals import StopRequest

_FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


@dataclass
class StepResult:
    """What a step came to, the same on every rank."""

    loss: float
    """Mean cross-entropy a token, nats."""
    grad_norm: float
    """Global gradient norm before clipping."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of the parts."""


def forward_step(
    iterator: Iterator[Batch | None], model: "nn.Module", end_to_end: bool = False
) -> tuple[Losses, Any]:
    """megatron's forward step: one micro-batch through one model chunk, side by side or end to end.

    Returns the chunk's output and the function that turns the last chunk's output (losses
    [b, s], or their sum) into (summed loss, tokens, what to report).
    """
    batch = next(iterator)
    sequence = _sequence(batch, end_to_end)
    if end_to_end and sequence is None:
        raise ValueError("sequences end to end need to be told where documents begin")
    if batch is None or "tokens" not in batch:  # between the first stage and the last
        return model(None, None, None, packed_seq_params=sequence), None
    return _losses(batch, sequence, model)


def piece_step(batch: Batch, past: Past, model: "nn.Module") -> tuple[Losses, Any]:
    """The same of one piece of the sequences of a micro-batch, whose batch has the piece's tokens
    and where the documents of the whole sequences begin."""
    tokens = batch["tokens"]
    assert tokens is not None
    return _losses(batch, piece_of(_sequence(batch), tokens.shape[1], past), model)


def _losses(
    batch: Batch, sequence: SequenceParams | None, model: "nn.Module"
) -> tuple[Losses, Any]:
    tensors = [
        batch[name].to(distributed.device(), non_blocking=True)  # type: ignore[union-attr]
        for name in _FIELDS
    ]
    if sequence is not None and sequence.sequences > 1:
        tensors = [tensor.reshape(1, -1) for tensor in tensors]
    tokens, labels, loss_mask, position_ids = tensors
    losses = model(
        tokens, position_ids, None, labels=labels, loss_mask=loss_mask, packed_seq_params=sequence
    )
    return losses, partial(summed_loss, loss_mask)


def _sequence(batch: Batch | None, end_to_end: bool = False) -> SequenceParams | None:
    """Where the documents of a micro-batch begin, if they stay apart."""
    start = batch.get("document_start") if batch is not None else None
    return None if start is None else documents_apart(start, distributed.device(), end_to_end)


def summed_loss(loss_mask: Tensor, losses: Losses) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of the losses that count, their number, both detached for the report).

    megatron divides the gradients once by the number over the whole batch, so that the result
    does not depend on how it was cut. A head that has the loss in it has summed by the same mask.
    """
    total = losses.total if isinstance(losses, SummedLosses) else (losses.float() * loss_mask).sum()
    count = loss_mask.sum()
    report = torch.stack([total.detach(), count])
    return total, count.to(torch.int), {"loss": report}


def own_piece() -> Piece:
    """What this rank has of each sequence."""
    return Piece(
        parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    )


def needs_tokens() -> bool:
    """Whether this pipeline stage is the first (tokens) or the last (labels)."""
    return parallel_state.is_pipeline_first_stage(
        ignore_virtual=True
    ) or parallel_state.is_pipeline_last_stage(ignore_virtual=True)


def needs_data(data: DataConfig) -> bool:
    """Whether this pipeline stage reads batches: tokens, or where documents begin."""
    return needs_tokens() or data.reset_at_document_boundaries


def run_schedule(
    chunks: "Sequence[nn.Module]",
    iterators: Sequence[Iterator[Batch | None]],
    num_microbatches: int,
    sequence_length: int,
    micro_batch_size: int,
    forward_only: bool,
    pieces: int | None = None,
) -> list[dict[str, Tensor]]:
    """Runs megatron's pipeline schedule; returns what the last stage reports, elsewhere [].

    ``pieces`` are those of a sequence where they are not as many as in training.
    """
    config = get_model_config(chunks[0])
    step: Callable[..., tuple[Losses, Any]] = forward_step
    pieces = pieces or config.sequence_pieces
    if pieces > 1:
        exact = config.sequence_piece_gradients == "exact"
        step = InPieces(piece_step, pieces, exact).forward_step
        num_microbatches *= pieces
        sequence_length //= pieces
    elif config.sequences_end_to_end and micro_batch_size > 1:
        step = partial(forward_step, end_to_end=True)
        sequence_length, micro_batch_size = sequence_length * micro_batch_size, 1
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=list(iterators) if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=num_microbatches,
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )


def mean_loss(reports: list[dict[str, Tensor]]) -> Tensor:
    """Mean loss over all counted tokens of all ranks, on every rank (fp64 scalar)."""
    total = torch.zeros(2, dtype=torch.float64, device=distributed.device())
    for report in reports:
        total += report["loss"].double()
    torch.distributed.all_reduce(
        total, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        torch.distributed.broadcast(
            total,
            src=parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return total[0] / total[1].clamp(min=1)


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
    guard: SpikeGuard | None = None,
    stop: "StopRequest | None" = None,
    timers: StepTimers | None = None,
    before_update: Callable[[], None] | None = None,
) -> StepResult:
    """Forward, backward, check, update.

    Args:
        chunks: this rank's model chunks in megatron's DDP wrapper.
        optimizer: megatron's.
        batches: this rank's micro-batches; None on stages that read none.
        sequence_length: tokens of a sequence.
        micro_batch_size: sequences of a micro-batch.
        guard: judges the loss; of the gradient norm the optimizer tells it (``watch_grad_norm``).
        stop: the ranks agree on it while they judge.
        timers: those of the chunks' schedules (:func:`attach_timers`), for the parts' times.
        before_update: called on every rank when the gradients are whole and judged.

    Raises:
        NonFiniteStep: before any weight has changed.
        SkippedStep: likewise, where there is a guard.
    """
    watch = Stopwatch()
    with watch.measure("forward_backward"), timers.step() if timers else nullcontext():
        loss = _forward_backward(
            chunks, optimizer, batches, sequence_length, micro_batch_size, guard, stop
        )
    # The device has just been waited for: reading its times costs nothing.
    parts = timers.read() if timers else {}
    if before_update is not None:
        before_update()
    with watch.measure("optimizer"), timers.update() if timers else nullcontext():
        updated, grad_norm, _ = optimizer.step()
    if not updated:
        raise NonFiniteStep(ExitCode.HOLD, "the optimizer refused the step")
    return StepResult(float(loss), float(grad_norm or 0.0), watch.seconds | parts)


def _forward_backward(
    chunks: "Sequence[Any]",
    optimizer: Any,
    batches: list[Batch | None],
    sequence_length: int,
    micro_batch_size: int,
    guard: SpikeGuard | None,
    stop: "StopRequest | None",
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
        reports = run_schedule(
            chunks, iterators, len(batches), sequence_length, micro_batch_size, forward_only=False
        )
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
    def run_forward() -> list[dict[str, Tensor]]:
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


def _are_finite(reports: list[dict[str, Tensor]]) -> bool:
    return all(bool(report["loss"].isfinite().all()) for report in reports)


def _forget_rerun() -> None:
    """The rerun state machine wants a restart to judge what could be repeated: not if skipped."""
    machine = get_rerun_state_machine()
    if machine.state != RerunState.NOT_RUNNING_YET:
        mode = machine.get_mode()
        destroy_rerun_state_machine()
        initialize_rerun_state_machine(mode=mode)
        get_rerun_state_machine().first_iteration_complete = True
