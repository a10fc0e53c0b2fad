"""The positions before a rank's own, from the ranks that hold them.

A convolution needs the last width - 1 of them, attention within a window the last window - 1: one
rank back where the pieces are longer than that, else several. Without a window it is all of them.

The gradient of a borrowed position goes back to its owner, who adds it to its own. Both directions
are posted when they can be and waited for only where they are needed: what is computed in between
(in the backward pass: its adjoint) hides them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from samba_megatron.ops.context_parallel.exchange import Exchange, Message


class EarlierPositions:
    """The latest positions before this rank's own, under way; every rank of the group must ask.

    Use: ask first, compute what does without, then :meth:`wait`.
    """

    def __init__(self, tensors: Sequence[Tensor], count: int, group: ProcessGroup) -> None:
        """Asks for them.

        Args:
            tensors: this rank's positions [s, …], all of one shape and dtype.
            count: how many earlier positions are wanted; where the sequence begins later than that,
                there are fewer: none on the first rank.
            group: the ranks that hold the sequence, s positions each.
        """
        self.length = min(count, group.rank() * tensors[0].shape[0])
        """How many there are."""
        self._flight = _Flight(tensors, count, group)
        self._posted = _Ask.apply(self._flight, *tensors)

    def wait(self) -> tuple[Tensor, ...]:
        """The positions [length, …] of each tensor, in the sequence's order."""
        rows: tuple[Tensor, ...] = _Take.apply(self._flight, self._posted)
        return rows


class _Flight:
    """Who sends what to whom, and the messages of one direction while they are under way."""

    def __init__(self, tensors: Sequence[Tensor], count: int, group: ProcessGroup) -> None:
        rank, size = group.rank(), group.size()
        neighbours = list(enumerate(_rows_of_neighbours(tensors[0].shape[0], count), start=1))
        self.group = group
        self.tensors = len(tensors)
        self.shape = tensors[0].shape
        self.borrowed = [(rank - d, rows) for d, rows in neighbours if d <= rank]
        """(rank, rows) whose last rows this rank takes, the nearest rank first."""
        self.lent = [(rank + d, rows) for d, rows in neighbours if rank + d < size]
        """(rank, rows) that this rank's last rows go to, the nearest rank first."""
        self.exchange: Exchange | None = None
        self.received: list[Tensor] = []

    def post(self, sends: list[Message], receives: list[tuple[int, int]], like: Tensor) -> None:
        """Sends one direction on its way; ``receives`` is (rank, rows)."""
        rest = (self.tensors, *self.shape[1:])
        messages = [Message(like.new_empty(rows, *rest), peer) for peer, rows in receives]
        self.exchange = Exchange(sends, messages, self.group)
        self.received = [message.tensor for message in messages]

    def land(self) -> list[Tensor]:
        """What has been received, [rows, tensors, …] each, in the order of the receives."""
        assert self.exchange is not None, "nothing is under way"
        self.exchange.wait()
        received, self.exchange, self.received = self.received, None, []
        return received


class _Ask(torch.autograd.Function):
    """Posts the rows that are lent; backward, adds up their gradients."""

    @staticmethod
    def forward(ctx: Any, flight: _Flight, *tensors: Tensor) -> Tensor:
        ctx.flight = flight
        sends = [Message(_last_rows(tensors, rows), peer) for peer, rows in flight.lent]
        flight.post(sends, flight.borrowed, tensors[0])
        return tensors[0].new_zeros(())  # ties _Take to this in the graph

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        flight: _Flight = ctx.flight
        gradients = flight.land()
        if not gradients:
            return (None,) * (1 + flight.tensors)
        length = flight.shape[0]
        total = gradients[0].new_zeros(length, flight.tensors, *flight.shape[1:])
        for gradient in gradients:
            total[length - gradient.shape[0] :] += gradient
        return (None, *total.unbind(1))


class _Take(torch.autograd.Function):
    """Waits for the rows that are borrowed; backward, posts their gradients."""

    @staticmethod
    def forward(ctx: Any, flight: _Flight, posted: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        received = flight.land()[::-1]
        if not received:
            received = [posted.new_empty(0, flight.tensors, *flight.shape[1:])]
        rows = received[0] if len(received) == 1 else torch.cat(received)
        return tuple(part.contiguous() for part in rows.unbind(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        flight: _Flight = ctx.flight
        left = torch.stack(gradients, dim=1)
        sends = []
        for peer, rows in flight.borrowed:
            left, last = left.split([left.shape[0] - rows, rows])
            sends.append(Message(last.contiguous(), peer))
        flight.post(sends, flight.lent, left)
        return None, gradients[0].new_zeros(())


def _rows_of_neighbours(length: int, count: int) -> list[int]:
    """How many of ``count`` positions the rank before holds, the one before that, and so on."""
    whole, rest = divmod(count, length)
    return [length] * whole + [rest] * (rest > 0)


def _last_rows(tensors: Sequence[Tensor], rows: int) -> Tensor:
    """The last rows of all tensors as one message [rows, tensors, …]."""
    return torch.stack([tensor[tensor.shape[0] - rows :] for tensor in tensors], dim=1)
