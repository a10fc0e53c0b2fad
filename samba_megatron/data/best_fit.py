"""Documents packed into samples whole: no document is cut that fits a sample.

Laying documents end to end and cutting at every ``sequence_length`` tokens leaves most samples with
a document's middle at either end. Packing by best fit (Ding et al., *Fewer Truncations Improve
Language Modeling*, 2024, arXiv 2404.10830) cuts only documents that are longer than a sample, and
leaves a little padding instead: pieces go, the longest first, where the least room is left.

A document of ``m`` tokens has ``m - 1`` positions to predict from: its last token is only a label,
so no label crosses documents.

How many pieces of each length there are decides how many samples a pass has and which lengths lie
together; the shuffle decides which documents have those lengths. So every pass is as long.
"""

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


class PackedSize(NamedTuple):
    """What one pass over a part of a dataset makes."""

    samples: int
    pieces: int
    """Stretches of documents, each in one sample."""
    positions: int
    """Of all pieces: what is not padding."""


class PackedPieces(NamedTuple):
    """The pieces of a pass, sample after sample."""

    documents: npt.NDArray[np.int32]
    """The sequence of each ``[p]``."""
    offsets: Integers
    """Its first token there ``[p]``."""
    starts: Integers
    """The first piece of each sample, and the end ``[n + 1]``."""


def packed_size(lengths: npt.NDArray[np.int32], sequence_length: int) -> PackedSize:
    """What a pass over documents of these lengths makes, without making it.

    Args:
        lengths: tokens of each document.
        sequence_length: positions of a sample.
    """
    whole, rest = _cut(lengths, sequence_length)
    counts = np.bincount(rest, minlength=1)
    counts[0] = 0
    placed = _place(counts, sequence_length)
    return PackedSize(
        samples=int(whole.sum()) + int(placed.max(initial=-1)) + 1,
        pieces=int(whole.sum()) + len(placed),
        positions=int(whole.sum()) * sequence_length + int(rest.sum()),
    )


def pack(
    documents: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32], sequence_length: int
) -> PackedPieces:
    """Packs documents; among those of one length the earlier are placed first.

    Args:
        documents: sequences in the order of the pass ``[d]``.
        lengths: tokens of each of them ``[d]``.
        sequence_length: positions of a sample.
    """
    whole, rest = _cut(lengths, sequence_length)
    by_length = np.argsort(-rest, kind="stable")[: np.count_nonzero(rest)]
    placed = _place(np.bincount(rest[by_length], minlength=1), sequence_length)
    # Then the documents that fill samples of their own, as often as they do.
    filling = np.repeat(np.arange(len(documents)), whole)
    within = np.arange(len(filling)) - np.repeat(np.cumsum(whole) - whole, whole)
    samples = np.concatenate([placed, int(placed.max(initial=-1)) + 1 + np.arange(len(filling))])
    places = np.concatenate([by_length, filling])
    offsets = np.concatenate([whole[by_length], within]) * sequence_length
    order = np.argsort(samples, kind="stable")
    ends = np.cumsum(np.bincount(samples, minlength=0))
    starts = np.concatenate([[0], ends])
    return PackedPieces(documents[places[order]], offsets[order], starts)


def _cut(lengths: npt.NDArray[np.int32], sequence_length: int) -> tuple[Integers, Integers]:
    """How many whole samples each document fills, and the positions of what is left of it."""
    positions = np.maximum(lengths.astype(np.int64) - 1, 0)
    return positions // sequence_length, positions % sequence_length


class _Rooms:
    """The samples that are begun, by the room that is left in them."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        """Those that there are, ascending."""
        self._samples: dict[int, list[Integers]] = {}

    def put(self, size: int, samples: Integers) -> None:
        """Samples with so much room."""
        if size and len(samples):
            if size not in self._samples:
                insort(self._sizes, size)
            self._samples.setdefault(size, []).append(samples)

    def tightest(self, length: int) -> tuple[int, Integers] | None:
        """The least room for a piece of ``length`` and the samples that have it, taken out."""
        place = bisect_left(self._sizes, length)
        if place == len(self._sizes):
            return None
        size = self._sizes.pop(place)
        return size, np.concatenate(self._samples.pop(size))


def _place(counts: Integers, capacity: int) -> Integers:
    """The sample of each piece, the longest pieces first, by best fit.

    Pieces of one length are placed together: samples with the tightest room take all that go into
    it, one after the other, which is what placing the pieces one by one comes to.

    Args:
        counts: how many pieces there are of each length, by length.
        capacity: the room of a sample.
    """
    rooms, placed, opened = _Rooms(), [np.empty(0, np.int64)], 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        missing = int(counts[length])
        while missing:
            found = rooms.tightest(length)
            if found is None:
                new = -(-missing // (capacity // length))
                found = capacity, np.arange(opened, opened + new)
                opened += new
            size, samples = found
            most = size // length
            taken = np.clip(missing - most * np.arange(len(samples)), 0, most)
            placed.append(np.repeat(samples, taken))
            missing -= int(taken.sum())
            for pieces in np.unique(taken).tolist():
                rooms.put(size - pieces * length, samples[taken == pieces])
    return np.concatenate(placed)
