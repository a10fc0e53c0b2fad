"""Reads a piece of an input in batches of documents, whatever the format, in bounded memory.

All readers give the same: texts as UTF-8 with their places, what is wrong at other places, and how
much was read. While a piece is read its content is hashed, for the manifest.
"""

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from samba_megatron.data.jsonl import (
    Defect,
    HashingReader,
    Issue,
    parse_block,
    parse_object,
    read_blocks,
    split_lines,
    text_of,
)
from samba_megatron.data.preprocessing.inputs import InputFile, Kind, open_input
from samba_megatron.data.preprocessing.shards import Piece
from samba_megatron.platform.errors import UserError

BATCH_BYTES = 4 << 20
"""Text handled at a time, unless one document is longer."""
_ROWS = 16_384
"""Of a parquet file, at a time, at most."""
_COUNTED_AT_ONCE = 16 << 20


@dataclass
class Batch:
    """Documents that lie one after another in a piece."""

    texts: list[bytes] = field(default_factory=list)
    """UTF-8, none empty."""
    places: list[int] = field(default_factory=list)
    """Line or row of each text, counted from 1 at the piece's start."""
    issues: list[Issue] = field(default_factory=list)
    """Places without a usable document, counted likewise."""
    lines: int = 0
    """All lines or rows of the batch."""
    blank_lines: int = 0
    read_bytes: int = 0
    """Decompressed."""
    metadata: list[dict[str, Any]] | None = None
    """What lies beside each text, where it was asked for."""


class PieceReader:
    """Iterates over a piece's batches; ``raw_bytes`` and ``sha256`` tell how far and of what."""

    def __init__(
        self,
        piece: Piece,
        text_key: str,
        with_metadata: bool = False,
        batch_bytes: int = BATCH_BYTES,
    ) -> None:
        self.piece = piece
        self.lines = 0
        """Lines or rows of the batches that were taken."""
        self._text_key = text_key
        self._with_metadata = with_metadata
        self._batch_bytes = batch_bytes
        self._hashing: HashingReader | None = None
        self._digest = hashlib.sha256()
        self._share = 0.0

    @property
    def raw_bytes(self) -> int:
        """Bytes of the file behind us."""
        if self._hashing is not None:
            return min(self._hashing.bytes_read, self.piece.raw_bytes)
        return int(self._share * self.piece.raw_bytes)

    @property
    def sha256(self) -> str:
        """Of the raw bytes read, or of a parquet file's texts; whole after the last batch."""
        return (self._hashing or self._digest).hexdigest()

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches.

        Raises:
            UserError: the file is damaged, cut short, unreadable or has changed.
        """
        batches = {
            Kind.JSONL: self._json_lines,
            Kind.TEXT: self._text,
            Kind.PARQUET: self._parquet,
        }[self.piece.file.kind]
        for batch in batches():
            yield batch
            self.lines += batch.lines

    def _json_lines(self) -> Iterator[Batch]:
        path = self.piece.file.path
        with open_input(path) as raw:
            _refuse_changed(raw, self.piece.file)
            source = _Range(raw, self.piece) if self._is_part() else raw
            self._hashing = HashingReader(source)
            for block in read_blocks(path, self._hashing, self._batch_bytes):
                batch = self._parsed(block)
                del block  # may be hundreds of megabytes
                yield batch

    def _is_part(self) -> bool:
        return self.piece.start > 0 or self.piece.end >= 0

    def _parsed(self, block: bytes) -> Batch:
        if self._with_metadata:
            return _parse_with_metadata(block, self._text_key)
        parsed = parse_block(block, self._text_key)
        return Batch(
            parsed.texts,
            parsed.text_lines,
            parsed.issues,
            parsed.lines,
            parsed.blank_lines,
            len(block),
        )

    def _text(self) -> Iterator[Batch]:
        path = self.piece.file.path
        with open_input(path) as raw:
            _refuse_changed(raw, self.piece.file)
            self._hashing = HashingReader(raw)
            text = b"".join(read_blocks(path, self._hashing, self._batch_bytes))
        batch = Batch(lines=1, read_bytes=len(text))
        _take(batch, 1, _checked(text), {} if self._with_metadata else None)
        yield batch

    def _parquet(self) -> Iterator[Batch]:
        import pyarrow
        from pyarrow import parquet

        path = self.piece.file.path
        with open_input(path) as raw:
            try:
                file = parquet.ParquetFile(raw, pre_buffer=False)
                yield from self._rows(file)
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(
                    f"{path} is damaged or cut short ({error}): fetch or write it again"
                ) from error

    def _rows(self, file: Any) -> Iterator[Batch]:
        """Row by row of the piece's row groups; nothing but the text is read if that is enough."""
        key = self._text_key
        if key not in file.schema_arrow.names:
            raise UserError(
                f"{self.piece.file.path} has no column {key!r} "
                f"({', '.join(file.schema_arrow.names)}): name one with --text-key"
            )
        last = file.num_row_groups if self.piece.end < 0 else self.piece.end
        groups = [file.metadata.row_group(group) for group in range(self.piece.start, last)]
        total = sum(group.num_rows for group in groups)
        taken = 0
        columns = None if self._with_metadata else [key]
        for number, group in enumerate(groups, start=self.piece.start):
            rows = self._batch_bytes * group.num_rows // max(group.total_byte_size, 1)
            for table in file.iter_batches(
                min(max(rows, 1), _ROWS), row_groups=[number], columns=columns, use_threads=False
            ):
                taken += table.num_rows
                self._share = taken / max(total, 1)
                yield self._of_table(table)

    def _of_table(self, table: Any) -> Batch:
        column = table.column(self._text_key)
        batch = Batch(lines=table.num_rows, read_bytes=column.nbytes)
        rest = table.to_pylist() if self._with_metadata else None
        for row, value in enumerate(_values(column), start=1):
            text = value if isinstance(value, Defect) else _checked(value)
            self._digest.update(text if isinstance(text, bytes) else b"\xff")
            self._digest.update(b"\xff")  # no UTF-8 text holds it
            metadata = None
            if rest is not None:
                metadata = {k: v for k, v in rest[row - 1].items() if k != self._text_key}
            _take(batch, row, text, metadata)
        return batch


def _refuse_changed(raw: BinaryIO, file: InputFile) -> None:
    """What was planned for one file must not be done on another."""
    size = getattr(raw, "size", None)
    if size is None:
        here = raw.tell()
        size = raw.seek(0, io.SEEK_END)
        raw.seek(here)
    if size != file.size:
        raise UserError(f"{file.path} changed since the work was planned: run again")


class _Range:
    """The lines of a file that start in a piece of it, as a file to read."""

    def __init__(self, raw: BinaryIO, piece: Piece) -> None:
        self._raw = raw
        self._end = piece.end
        self._done = piece.end == piece.start
        self._position = max(piece.start - 1, 0)
        raw.seek(self._position)
        self._ahead = b""
        # The line that began before belongs to the piece before.
        if piece.start > 0 and not self._done:
            self._skip_line()

    def _skip_line(self) -> None:
        while chunk := self._raw.read(1 << 16):
            cut = chunk.find(b"\n") + 1
            self._position += cut or len(chunk)
            if cut:
                self._ahead = chunk[cut:]
                break
        self._done = self._position >= self._end

    def read(self, size: int = -1) -> bytes:
        """The next bytes, up to the end of the last line that starts before the piece's end."""
        if self._done:
            return b""
        chunk = self._ahead or self._raw.read(size)
        self._ahead = b""
        start, self._position = self._position, self._position + len(chunk)
        if self._position < self._end:
            return chunk
        # The line that holds the last byte of the piece is its last line.
        cut = chunk.find(b"\n", max(self._end - 1 - start, 0)) + 1
        if cut:
            self._done = True
            return chunk[:cut]
        return chunk


def _take(batch: Batch, place: int, text: bytes | Defect, metadata: dict[str, Any] | None) -> None:
    """Adds what was found at a place to its batch."""
    if isinstance(text, Defect):
        batch.issues.append(Issue(place, text))
        return
    batch.texts.append(text)
    batch.places.append(place)
    if metadata is not None:
        batch.metadata = batch.metadata if batch.metadata is not None else []
        batch.metadata.append(metadata)


def _checked(text: bytes) -> bytes | Defect:
    if not text:
        return Defect.EMPTY
    if not text.isascii():
        try:
            text.decode()
        except UnicodeDecodeError:
            return Defect.NOT_UNICODE
    return text


def _values(column: Any) -> Iterator[bytes | Defect]:
    """The column's texts as UTF-8: of strings or of binary, nulls are defects."""
    import pyarrow

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    types = pyarrow.types
    wide = types.is_large_string(kind) or types.is_large_binary(kind)
    if not (wide or types.is_string(kind) or types.is_binary(kind)):
        yield from (Defect.NOT_STRING for _ in range(len(column)))
        return
    binary = column.cast(pyarrow.large_binary() if wide else pyarrow.binary())
    yield from (Defect.NOT_STRING if value is None else value for value in binary.to_pylist())


def _parse_with_metadata(block: bytes, text_key: str) -> Batch:
    """As parse_block, but keeps each object's other keys."""
    batch = Batch(read_bytes=len(block), metadata=[])
    for number, line in enumerate(split_lines(block), start=1):
        batch.lines = number
        if not line or bytes(line).isspace():
            batch.blank_lines += 1
            continue
        found = parse_object(line)
        if isinstance(found, Defect):
            batch.issues.append(Issue(number, found))
            continue
        text = text_of(found, text_key)
        found.pop(text_key, None)
        _take(batch, number, text, found)
    return batch


def place_name(piece: Piece, place: int) -> str:
    """Where a document is, for a person: a file's line or row, counted from its start."""
    file = piece.file
    if file.kind is Kind.TEXT:
        return file.path
    if file.kind is Kind.PARQUET:
        return f"{file.path}:row {_rows_before(piece) + place}"
    return f"{file.path}:{_lines_before(piece) + place}"


def _lines_before(piece: Piece) -> int:
    """Lines that start before the piece: only counted to name a place."""
    if piece.start == 0:
        return 0
    lines, left = 0, piece.start - 1
    with open_input(piece.file.path) as raw:
        while left > 0 and (chunk := raw.read(min(left, _COUNTED_AT_ONCE))):
            lines += chunk.count(b"\n")
            left -= len(chunk)
    return lines + 1


def _rows_before(piece: Piece) -> int:
    from pyarrow import parquet

    if piece.start == 0:
        return 0
    with open_input(piece.file.path) as raw:
        metadata = parquet.ParquetFile(raw).metadata
        return sum(metadata.row_group(group).num_rows for group in range(piece.start))
