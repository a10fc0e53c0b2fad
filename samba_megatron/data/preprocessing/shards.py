"""Cuts the inputs into shards: what one task reads, and one dataset holds.

The cut depends on the files' names, order and sizes alone, never on workers or machines, so that
any run of any kind makes the same datasets. Plain JSON lines are cut anywhere (a line belongs to
the piece in which it starts), parquet between row groups, compressed files not at all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from samba_megatron.data.preprocessing.inputs import InputFile, Kind, open_input
from samba_megatron.platform.errors import UserError

_SMALLEST_SHARD = 256 << 20
"""About two seconds of work: less than this is not worth a dataset of its own."""
_SHARDS = 2000
"""So many datasets are still opened in seconds when training starts."""
_CUT_BEYOND = 1.5
"""Files up to so many shards long stay whole."""


@dataclass(frozen=True)
class Piece:
    """A part of an input file."""

    file: InputFile
    start: int
    """First byte of plain JSON lines, first row group of parquet; else 0."""
    end: int
    """One after the last; -1: to the end."""
    raw_bytes: int
    """Bytes of the file that it covers, about."""

    @property
    def text_bytes(self) -> int:
        """The text it holds, about."""
        return self.file.text_bytes * self.raw_bytes // max(self.file.size, 1)


@dataclass(frozen=True)
class Shard:
    """Pieces that one task turns into one dataset."""

    number: int
    pieces: tuple[Piece, ...]

    @property
    def text_bytes(self) -> int:
        """Text it holds, about."""
        return sum(piece.text_bytes for piece in self.pieces)

    @property
    def raw_bytes(self) -> int:
        """Bytes of the files that it covers, about."""
        return sum(piece.raw_bytes for piece in self.pieces)


def plan_shards(files: list[InputFile], shard_bytes: int | None = None) -> list[Shard]:
    """Cuts ``files`` into shards of about ``shard_bytes`` of text each."""
    total = sum(file.text_bytes for file in files)
    target = shard_bytes or max(_SMALLEST_SHARD, total // _SHARDS)
    if total <= target * _CUT_BEYOND:
        return [Shard(0, tuple(_whole(file) for file in files))]
    shards: list[Shard] = []
    pieces: list[Piece] = []
    weight = 0
    for file in files:
        for piece in _cut(file, target):
            if pieces and weight + piece.text_bytes // 2 > target:
                shards.append(Shard(len(shards), tuple(pieces)))
                pieces, weight = [], 0
            pieces.append(piece)
            weight += piece.text_bytes
    return [*shards, Shard(len(shards), tuple(pieces))]


def _whole(file: InputFile) -> Piece:
    return Piece(file, 0, -1, file.size)


def _cut(file: InputFile, target: int) -> Iterator[Piece]:
    parts = -(-file.text_bytes // target) if file.text_bytes > target * _CUT_BEYOND else 1
    if parts == 1 or file.packed or file.kind is Kind.TEXT:
        yield _whole(file)
        return
    units = row_groups(file) if file.kind is Kind.PARQUET else file.size
    parts = min(parts, units)
    bounds = [units * part // parts for part in range(parts + 1)]
    for start, end in pairwise(bounds):
        yield Piece(file, start, end, file.size * (end - start) // units)


_row_groups: dict[InputFile, int] = {}


def row_groups(file: InputFile) -> int:
    """Row groups of a parquet file.

    Raises:
        UserError: it is none, or is cut short.
    """
    if file not in _row_groups:
        _row_groups[file] = _count_row_groups(file)
    return _row_groups[file]


def _count_row_groups(file: InputFile) -> int:
    import pyarrow
    from pyarrow import parquet

    try:
        with open_input(file.path) as raw:
            return parquet.ParquetFile(raw).num_row_groups
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{file.path} is damaged or cut short ({error}): fetch or write it again"
        ) from error
