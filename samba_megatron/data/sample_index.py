"""The order of the samples inside one source, and its cache.

One epoch of a source is what Megatron's ``GPTDataset`` makes of it: the documents shuffled and laid
end to end, cut into samples of ``sequence_length`` (+ 1 token that the next one shares), and the
samples shuffled. Megatron shuffles all the epochs of a run together, so asking for more samples
re-orders those already seen; here every epoch has its own seed, so that a source has one order
whatever the run's length, its share in the blend and the other sources. Packed by best fit
(:mod:`samba_megatron.data.best_fit`), the same shuffled documents make other samples.

Orders are cached in *packs*: one file with the orders of many sources, each under a key that covers
the source's content. One rank builds what no pack has, in one new pack that appears whole; the
others map it. A pack is a table in JSON and int32 numbers.
"""

import hashlib
import json
import os
import struct
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from samba_megatron.data.best_fit import PackedSize, pack
from samba_megatron.data.indexed import sequence_lengths
from samba_megatron.platform.errors import UserError
from samba_megatron.platform.files import publish

_MAGIC = b"SAMPACK2"
_HEADER = struct.Struct("<8sQ")
_ALIGNMENT = 64
_PARALLEL_FROM = 20_000_000
"""Documents from which starting processes pays."""
_MOST_WORKERS = 32
_MOST = np.iinfo(np.int32).max

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class SourcePart:
    """The part of a dataset that a run reads: a range of its sequences."""

    name: str
    prefix: str
    fingerprint: str
    first: int
    last: int
    """One past the last sequence."""
    tokens: int
    packed: PackedSize | None = None
    """What a pass makes where documents are packed by best fit; None where they lie end to end."""

    def samples_per_epoch(self, sequence_length: int) -> int:
        """Samples in one pass. End to end, the tokens that do not fill one are left out."""
        if self.packed is not None:
            return self.packed.samples
        return (self.tokens - 1) // sequence_length


@dataclass(frozen=True)
class EpochOrder:
    """One shuffled pass over a part. ``d`` sequences, ``n`` samples; packed by best fit, ``p``
    pieces of sequences."""

    documents: Int32
    """The sequences in order ``[d]``; packed, that of each piece ``[p]``."""
    starts: Int32
    """The place in ``documents`` where each sample begins, and the end ``[n + 1]``."""
    offsets: Int32
    """The token of that sequence at which it does ``[n + 1]``; packed, that of each piece
    ``[p]``."""
    shuffle: Int32
    """The samples in order ``[n]``."""


class Stored(NamedTuple):
    """Where a pack holds an order."""

    pack: str
    """File name in the cache."""
    start: int
    """Byte."""
    sizes: tuple[int, ...]
    """Of an order's arrays."""


def order_key(part: SourcePart, epoch: int, sequence_length: int, seed: int) -> str:
    """The name of an order: equal for equal content, settings and seed, wherever the data lie."""
    what = f"{part.fingerprint} {part.first}:{part.last} {sequence_length} {seed + epoch}"
    what += "" if part.packed is None else " best_fit"
    return hashlib.sha256(what.encode()).hexdigest()[:32]


def epoch_order(part: SourcePart, epoch: int, sequence_length: int, seed: int) -> EpochOrder:
    """Makes the order of one epoch.

    Memory: about 12 bytes a sequence and 16 a sample; packed, about 100 a sequence.

    Raises:
        UserError: the dataset has more sequences than 32 bits count.
    """
    if max(part.last, *_sizes(part, sequence_length)) > _MOST:
        raise UserError(f"the dataset {part.prefix} has over {_MOST} documents: split it")
    random = np.random.RandomState(seed + epoch)
    documents = np.arange(part.first, part.last, dtype=np.int32)
    random.shuffle(documents)
    lengths = sequence_lengths(part.prefix)
    samples = part.samples_per_epoch(sequence_length)
    if part.packed is not None:
        pieces = pack(documents, lengths[documents], sequence_length)
        shuffle = np.arange(samples, dtype=np.int32)
        random.shuffle(shuffle)
        return EpochOrder(
            pieces.documents,
            pieces.starts.astype(np.int32),
            pieces.offsets.astype(np.int32),
            shuffle,
        )
    ends = np.cumsum(lengths[documents], dtype=np.int64)
    first_tokens = np.arange(samples + 1, dtype=np.int64) * sequence_length
    starts = np.searchsorted(ends, first_tokens, side="right")
    before = np.where(starts > 0, ends[starts - 1], 0)
    shuffle = np.arange(samples, dtype=np.int32)
    random.shuffle(shuffle)
    offsets = (first_tokens - before).astype(np.int32)
    return EpochOrder(documents, starts.astype(np.int32), offsets, shuffle)


class OrderCache:
    """The packs in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._packs: dict[str, npt.NDArray[Any]] = {}

    def ensure(
        self, wanted: Sequence[tuple[SourcePart, int]], sequence_length: int, seed: int
    ) -> dict[str, Stored]:
        """Where each order lies, after building those that no pack has.

        One process calls it; what it returns may be given to others, and used there by
        :meth:`load` with the same folder. Two jobs that build the same at once are no harm.

        Args:
            wanted: parts and epochs.
            sequence_length: tokens of a sample.
            seed: of the first epoch; the next ones count up from it.

        Raises:
            UserError: the cache cannot be written.
        """
        keyed = {order_key(p, epoch, sequence_length, seed): (p, epoch) for p, epoch in wanted}
        known = self._known()
        missing = {key: entry for key, entry in keyed.items() if key not in known}
        if missing:
            try:
                known |= self._build(missing, sequence_length, seed)
            except OSError as error:
                raise UserError(cannot_write(self.folder, error)) from error
        return {key: known[key] for key in keyed}

    def load(self, stored: Stored) -> EpochOrder:
        """Maps an order; each pack is opened once."""
        if stored.pack not in self._packs:
            path = self.folder / stored.pack
            self._packs[stored.pack] = np.memmap(path, mode="r", dtype=np.uint8)
        sizes = stored.sizes
        numbers = np.frombuffer(self._packs[stored.pack], np.int32, sum(sizes), stored.start)
        return EpochOrder(*np.split(numbers, np.cumsum(sizes)[:-1]))

    def _known(self) -> dict[str, Stored]:
        """All orders of all packs; a file that is no pack is passed over."""
        known: dict[str, Stored] = {}
        for path in sorted(self.folder.glob("*.pack")):
            try:
                with open(path, "rb") as stream:
                    known |= _read_table(stream, path.name)
            except (OSError, ValueError):
                continue
        return known

    def _build(
        self, missing: dict[str, tuple[SourcePart, int]], sequence_length: int, seed: int
    ) -> dict[str, Stored]:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(" ".join(sorted(missing)).encode()).hexdigest()[:32] + ".pack"
        temporary = self.folder / f".{name}.{uuid.uuid4().hex}.partial"
        table = dict(_lay_out(missing, sequence_length))
        try:
            with open(temporary, "wb") as stream:
                _write_table(stream, table)
                data = stream.tell()
            _do_all(
                [
                    _Work(part, epoch, sequence_length, seed, str(temporary), data + table[key][0])
                    for key, (part, epoch) in missing.items()
                ]
            )
            publish(temporary, self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)
        with open(self.folder / name, "rb") as stream:
            return _read_table(stream, name)


def cannot_write(folder: Path, error: OSError) -> str:
    """What to say where the index cache cannot be written."""
    return (
        f"cannot write the index cache {folder} ({error.strerror}): set data.path_to_cache to a "
        "folder with room that all nodes share"
    )


class _Work(NamedTuple):
    """An order to make, and where it goes."""

    part: SourcePart
    epoch: int
    sequence_length: int
    seed: int
    file: str
    start: int
    """Byte in the file."""


def _do_all(works: Sequence[_Work]) -> None:
    """Makes the orders; on all cores where there is much to do (0.2 µs a document on one)."""
    documents = sum(work.part.last - work.part.first for work in works)
    workers = min(len(works), len(os.sched_getaffinity(0)), _MOST_WORKERS)
    if documents < _PARALLEL_FROM or workers == 1:
        for work in works:
            _do(work)
        return
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(_do, works))


def _do(work: _Work) -> None:
    order = epoch_order(work.part, work.epoch, work.sequence_length, work.seed)
    with open(work.file, "rb+") as stream:
        stream.seek(work.start)
        for numbers in (order.documents, order.starts, order.offsets, order.shuffle):
            stream.write(numbers.data)


def _sizes(part: SourcePart, sequence_length: int) -> tuple[int, int, int, int]:
    """Of the arrays of an order: documents, starts, offsets and shuffle."""
    samples = part.samples_per_epoch(sequence_length)
    if part.packed is not None:
        return part.packed.pieces, samples + 1, part.packed.pieces, samples
    return part.last - part.first, samples + 1, samples + 1, samples


def _lay_out(
    missing: dict[str, tuple[SourcePart, int]], sequence_length: int
) -> Iterator[tuple[str, list[int]]]:
    """Key, and byte (after the table) and sizes of each order."""
    start = 0
    for key, (part, _) in missing.items():
        sizes = _sizes(part, sequence_length)
        yield key, [start, *sizes]
        start += 4 * sum(sizes)


def _write_table(stream: BinaryIO, table: dict[str, list[int]]) -> None:
    content = json.dumps(table).encode()
    padded = content.ljust(
        -(-(_HEADER.size + len(content)) // _ALIGNMENT) * _ALIGNMENT - _HEADER.size
    )
    stream.write(_HEADER.pack(_MAGIC, len(padded)))
    stream.write(padded)


def _read_table(stream: BinaryIO, name: str) -> dict[str, Stored]:
    magic, length = _HEADER.unpack(stream.read(_HEADER.size).ljust(_HEADER.size))
    if magic != _MAGIC:
        raise ValueError(f"{name} is no pack")
    table = json.loads(stream.read(length))
    data = _HEADER.size + length
    stored = {
        key: Stored(name, data + start, tuple(sizes)) for key, (start, *sizes) in table.items()
    }
    last = max(entry.start + 4 * sum(entry.sizes) for entry in stored.values())
    if os.fstat(stream.fileno()).st_size != last:
        raise ValueError(f"{name} is truncated")
    return stored
