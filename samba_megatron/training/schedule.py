"""megatron's pipeline schedule over the micro-batches of a step, and what comes of it."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from samba_megatron.config.data import DataConfig
from samba_megatron.data.stream import Batch, Piece
from samba_megatron.model.head import Losses
from samba_megatron.platform import distributed
from samba_megatron.training.micro_batch import MicroBatch, forward_step, piece_step
from samba_megatron.training.pieces import InPieces

if TYPE_CHECKING:
    from torch import nn

Reports = list[dict[str, Tensor]]
"""What the last stage reports of each micro-batch; elsewhere []."""


class Schedule(Protocol):
    """Forward and backward over the micro-batches of a step: gradients in the buffers."""

    def __call__(
        self,
        chunks: "Sequence[nn.Module]",
        iterators: Sequence[Iterator[Batch | MicroBatch | None]],
        num_microbatches: int,
        sequence_length: int,
        micro_batch_size: int,
    ) -> Reports:
        """Of each model chunk the batches, and how many and how large they are."""
        ...


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


def lies_end_to_end(chunks: "Sequence[nn.Module]", micro_batch_size: int) -> bool:
    """Whether the sequences of a micro-batch are laid end to end."""
    config = get_model_config(chunks[0])
    return config.sequences_end_to_end and micro_batch_size > 1


def run_schedule(
    chunks: "Sequence[nn.Module]",
    iterators: Sequence[Iterator[Batch | MicroBatch | None]],
    num_microbatches: int,
    sequence_length: int,
    micro_batch_size: int,
    forward_only: bool = False,
    pieces: int | None = None,
) -> Reports:
    """Runs megatron's pipeline schedule.

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
    elif lies_end_to_end(chunks, micro_batch_size):
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


def mean_loss(reports: Reports) -> Tensor:
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
