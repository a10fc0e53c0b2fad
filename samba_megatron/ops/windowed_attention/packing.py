"""Documents laid end to end, as kernels for sequences of several lengths take them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class PackedDocuments(NamedTuple):
    """Where the ``n`` documents of a batch end when its sequences are laid one after the other."""

    query_ends: Tensor
    """int32 ``[n + 1]``: 0, and one past each document's last query."""
    key_ends: Tensor
    """int32 ``[n + 1]``: the same of the keys; equal unless the keys have a halo."""
    most_queries: int
    """Of one document."""
    most_keys: int

    def to(self, device: torch.device | str) -> "PackedDocuments":
        """The same on another device."""
        return self._replace(
            query_ends=self.query_ends.to(device, non_blocking=True),
            key_ends=self.key_ends.to(device, non_blocking=True),
        )

    def filled(self, room: int, longest: int) -> "PackedDocuments":
        """The same with empty documents at the end, ``room`` in all, none longer than ``longest``:
        what a graph of a GPU's kernels can be given again and again.

        Raises:
            ValueError: there are more documents.
        """
        missing = room + 1 - len(self.query_ends)
        if missing < 0:
            raise ValueError(f"{len(self.query_ends) - 1} documents have no place in {room}")
        queries, keys = (
            torch.cat([ends, ends[-1:].expand(missing)])
            for ends in (self.query_ends, self.key_ends)
        )
        return PackedDocuments(queries, keys, longest, longest)


PackedStretches = Callable[[slice, int], PackedDocuments | None]
"""(positions of the keys in the whole sequence, how many queries end them) → their documents."""


def pack_documents(reset: Tensor, queries: int | None = None) -> PackedDocuments:
    """Lays the documents of a batch end to end, one sequence after the other.

    How many there are decides the result's shape, so on a GPU this waits for the device: better
    called before ``reset`` goes there.

    Args:
        reset: bool [t, b], True where a document starts; each sequence's first position starts one,
            marked or not.
        queries: how many of the ``t`` positions, the last ones, are queries'; all when absent. A
            document that ends before them is kept, without queries.
    """
    total, batch = reset.shape
    queries = total if queries is None else queries
    starts = reset.t().clone()
    starts[:, 0] = True
    sequence, position = starts.nonzero(as_tuple=True)
    query_starts = sequence * queries + (position - (total - queries)).clamp(min=0)
    query_ends = _with_end(query_starts, batch * queries)
    key_ends = _with_end(sequence * total + position, batch * total)
    return PackedDocuments(query_ends, key_ends, _longest(query_ends), _longest(key_ends))


def _with_end(starts: Tensor, end: int) -> Tensor:
    return torch.cat([starts, starts.new_tensor([end])]).to(torch.int32)


def _longest(ends: Tensor) -> int:
    return int(ends.diff().max())


def lay_end_to_end(x: Tensor) -> Tensor:
    """[s, b, heads, hd] → [b·s, heads, hd], one sequence after the other; a view, and so is the
    gradient, where the memory has them so already."""
    rows = x.transpose(0, 1)
    return (rows if rows.is_contiguous() else _Swap.apply(x)).flatten(0, 1)


def put_side_by_side(y: Tensor, batch: int) -> Tensor:
    """[b·s, heads, hd] → [s, b, heads·hd], a view: the memory has one sequence after the other."""
    return y.view(batch, y.shape[0] // batch, -1).transpose(0, 1)


def in_rows(y: Tensor) -> Tensor:
    """[s, b, …] contiguous, which a kernel's result need not be."""
    return y if y.is_contiguous() else _Swap.apply(y.transpose(0, 1))


class _Swap(torch.autograd.Function):
    """[m, n, …] → [n, m, …], contiguous, and so is the gradient.

    torch copies a transposed tensor element by element, at a third of the memory's speed in half
    precision: it is made to believe that elements are 16 bytes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _swapped(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _swapped(gradient)


def _swapped(x: Tensor) -> Tensor:
    wide = 16 // x.element_size()
    fits = x.stride(-1) == 1 and not any(
        number % wide for number in (x.shape[-1], x.storage_offset(), *x.stride()[:-1])
    )
    if not fits:
        return x.transpose(0, 1).contiguous()
    return x.view(torch.complex128).transpose(0, 1).contiguous().view(x.dtype)
