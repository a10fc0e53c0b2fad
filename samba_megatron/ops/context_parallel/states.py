"""The state that a scan enters each rank with: an exclusive scan over ranks of affine maps.

A rank's positions take a state h to D·h + S, element by element: S is what they leave of a zero
state, D the product of their decays (Mamba, arXiv 2312.00752, section 3.3.2, whose scan over time
this goes on over ranks). The maps of neighbours compose to one of the same kind, so rank r has the
composition of all before it after about log2(ranks) messages.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from samba_megatron.ops.context_parallel.exchange import Exchange, Message


def exclusive_scan(
    decay: Tensor, state: Tensor, group: ProcessGroup, backward_in_time: bool = False
) -> Tensor:
    """The state that enters this rank; nothing is differentiated.

    The first message brings the neighbour's map; then, a map that spans d ranks is joined with that
    of the rank d further, d = 1, 2, 4, … The last message brings states only: 2·rounds - 1 times
    ``state`` is the most that a rank sends, with 1 + ceil(log2(ranks - 1)) rounds.

    Args:
        decay: D, the factor that this rank's positions put on a state; any shape.
        state: S, what they leave of a zero state; of the same shape, both in fp32 or fp64.
        group: the ranks in the order of time.
        backward_in_time: the other way, as gradients go: the last rank is the first.

    Returns:
        Of the same shape; zeros on the first rank.
    """
    line = _Line(group, backward_in_time)
    most = line.size - 1
    # The map of the rank before; then of the two before, of the four before, …
    before = line.shift(_Map(decay, state), 1, first=0, whole=most > 1)
    span = 1
    while span < most:
        further = line.shift(before, span, first=1, whole=2 * span < most)
        if before is not None and further is not None:
            before = further.then(before)
        span *= 2
    return torch.zeros_like(state) if before is None else before.state


class _Map(NamedTuple):
    """h to decay·h + state."""

    decay: Tensor | None
    """Absent where only a zero state will be mapped."""
    state: Tensor

    def stacked(self) -> Tensor:
        """State and decay as one tensor [2, …]."""
        assert self.decay is not None
        return torch.stack([self.state, self.decay])

    def then(self, after: "_Map") -> "_Map":
        """This map followed by another."""
        assert after.decay is not None
        decay = None if self.decay is None else self.decay * after.decay
        return _Map(decay, torch.addcmul(after.state, after.decay, self.state))


class _Line:
    """A group's ranks in the order in which the scan passes them."""

    def __init__(self, group: ProcessGroup, backward_in_time: bool) -> None:
        self.group, self.size = group, group.size()
        self._backward = backward_in_time
        self.place = self._rank_of(group.rank())

    def _rank_of(self, place: int) -> int:
        """The rank of a place, and the place of a rank."""
        return self.size - 1 - place if self._backward else place

    def shift(self, own: _Map | None, distance: int, first: int, whole: bool) -> _Map | None:
        """Passes each place's map ``distance`` places on; what this one receives, if anything.

        Args:
            own: this place's map; places before ``first`` have none.
            distance: in places.
            first: the first place that has a map.
            whole: whether decays are wanted, or states only.
        """
        sends, receives = [], []
        if self.place >= first and self.place + distance < self.size:
            assert own is not None
            message = own.state.contiguous() if not whole else own.stacked()
            sends.append(Message(message, self._rank_of(self.place + distance)))
        if self.place - distance >= first:
            assert own is not None
            like = own.state
            buffer = like.new_empty((2, *like.shape) if whole else like.shape)
            receives.append(Message(buffer, self._rank_of(self.place - distance)))
        Exchange(sends, receives, self.group).wait()
        if not receives:
            return None
        buffer = receives[0].tensor
        return _Map(buffer[1], buffer[0]) if whole else _Map(None, buffer)


def carry_between(group: ProcessGroup | None) -> "RankCarry | None":
    """The carry of a scan over a group's ranks; None where there is nobody to join it to."""
    return None if group is None or group.size() == 1 else RankCarry(group)


class RankCarry:
    """Joins the scans of a group's ranks, in the place of an initial state (see
    :class:`~samba_megatron.ops.selective_scan.carry.Carry`)."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def __call__(self, decay: Tensor, state: Tensor, backward_in_time: bool) -> Tensor:
        """What enters this rank's positions; every rank must call it, in the same order."""
        return exclusive_scan(decay, state, self._group, backward_in_time)
