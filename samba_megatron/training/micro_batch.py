"""From a batch to the losses of one model chunk: megatron's forward step."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from samba_megatron.data.stream import Batch
from samba_megatron.model.head import Losses, SummedLosses
from samba_megatron.model.sequence import SequenceParams, documents_apart, piece_of
from samba_megatron.ops.continued import Past
from samba_megatron.platform import distributed

if TYPE_CHECKING:
    from torch import nn

FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


class MicroBatch(NamedTuple):
    """What a model chunk is given of a batch, on its device; a chunk that reads no tokens gets
    ``sequence`` only."""

    sequence: SequenceParams | None = None
    """Where documents begin, if they stay apart."""
    tokens: Tensor | None = None
    """int64 [b, s]; [1, b·s] where sequences lie end to end. So are the others."""
    labels: Tensor | None = None
    loss_mask: Tensor | None = None
    position_ids: Tensor | None = None


def on_device(batch: Batch | None, end_to_end: bool = False) -> MicroBatch:
    """A batch as the model takes it, its sequences side by side or end to end.

    Raises:
        ValueError: sequences end to end, without telling where documents begin.
    """
    sequence = _sequence(batch, end_to_end)
    if end_to_end and sequence is None:
        raise ValueError("sequences end to end need to be told where documents begin")
    if batch is None or "tokens" not in batch:  # between the first stage and the last
        return MicroBatch(sequence)
    return _with_tokens(batch, sequence)


def forward_step(
    iterator: Iterator[Batch | MicroBatch | None], model: "nn.Module", end_to_end: bool = False
) -> tuple[Losses, Any]:
    """megatron's forward step: one micro-batch through one model chunk.

    Args:
        iterator: gives batches, or what has been made of them.
        model: the chunk.
        end_to_end: how the sequences of a batch are to lie.

    Returns:
        The chunk's output and the function that turns the last chunk's output (losses [b, s], or
        their sum) into (summed loss, tokens, what to report).
    """
    batch = next(iterator)
    if not isinstance(batch, MicroBatch):
        batch = on_device(batch, end_to_end)
    if batch.tokens is None:
        return model(None, None, None, packed_seq_params=batch.sequence), None
    return _losses(batch, model)


def piece_step(batch: Batch, past: Past, model: "nn.Module") -> tuple[Losses, Any]:
    """The same of one piece of the sequences of a micro-batch, whose batch has the piece's tokens
    and where the documents of the whole sequences begin."""
    tokens = batch["tokens"]
    assert tokens is not None
    piece = piece_of(_sequence(batch), tokens.shape[1], past)
    return _losses(_with_tokens(batch, piece), model)


def summed_loss(loss_mask: Tensor, losses: Losses) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of the losses that count, their number, both detached for the report).

    megatron divides the gradients once by the number over the whole batch, so that the result
    does not depend on how it was cut. A head that has the loss in it has summed by the same mask.
    """
    total = losses.total if isinstance(losses, SummedLosses) else (losses.float() * loss_mask).sum()
    count = loss_mask.sum()
    report = torch.stack([total.detach(), count])
    return total, count.to(torch.int), {"loss": report}


def _losses(batch: MicroBatch, model: "nn.Module") -> tuple[Losses, Any]:
    assert batch.loss_mask is not None
    losses = model(
        batch.tokens,
        batch.position_ids,
        None,
        labels=batch.labels,
        loss_mask=batch.loss_mask,
        packed_seq_params=batch.sequence,
    )
    return losses, partial(summed_loss, batch.loss_mask)


def _with_tokens(batch: Batch, sequence: SequenceParams | None) -> MicroBatch:
    tensors = {
        name: batch[name].to(distributed.device(), non_blocking=True)  # type: ignore[union-attr]
        for name in FIELDS
    }
    if sequence is not None and sequence.sequences > 1:
        tensors = {name: tensor.reshape(1, -1) for name, tensor in tensors.items()}
    return MicroBatch(sequence, **tensors)


def _sequence(batch: Batch | None, end_to_end: bool = False) -> SequenceParams | None:
    """Where the documents of a micro-batch begin, if they stay apart."""
    start = batch.get("document_start") if batch is not None else None
    return None if start is None else documents_apart(start, distributed.device(), end_to_end)
