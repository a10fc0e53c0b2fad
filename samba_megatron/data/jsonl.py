"""Reads corpora of JSON lines, plain or compressed, in blocks of whole lines.

A block is what one worker tokenizes at a time: some megabytes, whatever the size of the file, so
that memory stays bounded. While a file is read its raw bytes are counted and hashed: the counts
drive the progress display, the hash goes into the manifest.
"""

import glob
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import orjson

from samba_megatron.platform.errors import UserError

_READ_BYTES = 1 << 20
_READ_ZSTD_BYTES = 1 << 16
"""Less than a plain read: what is read here unpacks to many times its size at once."""

_LARGE_BLOCK = 32 << 20
"""A block of this size holds a document of tens of megabytes."""
_LONGEST_BLANK = 4096

_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst")


class Defect(StrEnum):
    """Why a line holds no document."""

    MALFORMED = "malformed JSON"
    NOT_OBJECT = "not a JSON object"
    MISSING_KEY = "no text under the key"
    NOT_STRING = "text is not a string"
    NOT_UNICODE = "text is not valid Unicode"
    EMPTY = "empty document"


@dataclass(frozen=True)
class Issue:
    """A line without a usable document."""

    line: int
    """Counted from 1."""
    defect: Defect


@dataclass
class ParsedBlock:
    """The documents of a block of lines."""

    texts: list[bytes]
    """UTF-8."""
    text_lines: list[int]
    """The line of each text, counted from 1 at the block's start."""
    issues: list[Issue]
    lines: int
    """All lines of the block."""
    blank_lines: int
    """Lines of white space alone, passed over silently."""


def expand_inputs(patterns: Iterable[str]) -> list[Path]:
    """The files that ``patterns`` (paths or globs, ``**`` included) name, each once, in order.

    Raises:
        UserError: a pattern names nothing, or a file is not JSON lines by its ending.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f"no file matches the input {pattern}")
        for name in found:
            if not name.endswith(_ENDINGS) or Path(name).is_dir():
                raise UserError(f"{name} is not among {', '.join(_ENDINGS)}: name JSON lines files")
            files[Path(name)] = None
    return list(files)


class Readable(Protocol):
    """What bytes are read from."""

    def read(self, size: int = -1, /) -> bytes:
        """As a file's."""
        ...


class HashingReader:
    """Reads a file's raw bytes, keeping their count and SHA-256."""

    def __init__(self, raw: Readable) -> None:
        self._raw = raw
        self._digest = hashlib.sha256()
        self.bytes_read = 0

    def read(self, size: int = -1) -> bytes:
        """Like a file's ``read``."""
        data = self._raw.read(size)
        self._digest.update(data)
        self.bytes_read += len(data)
        return data

    def hexdigest(self) -> str:
        """SHA-256 of everything read so far."""
        return self._digest.hexdigest()


def read_blocks(path: str | Path, reader: HashingReader, block_bytes: int) -> Iterator[bytes]:
    """Yields the decompressed file in blocks of whole lines of at least ``block_bytes``.

    Raises:
        UserError: the file is compressed and damaged or cut short.
    """
    pieces: list[bytes] = []
    size = 0
    for chunk in _chunks(path, reader):
        cut = chunk.rfind(b"\n") + 1
        if cut and size + cut >= block_bytes:
            # Popped: nothing here holds a block of hundreds of megabytes while it is worked on.
            pieces = [b"".join([*pieces, chunk[:cut]])]
            yield pieces.pop()
            chunk = chunk[cut:]
            size = 0
        pieces.append(chunk)
        size += len(chunk)
    if size:
        pieces = [b"".join(pieces)]
        yield pieces.pop()


def _chunks(path: str | Path, reader: HashingReader) -> Iterator[bytes]:
    """The decompressed bytes of a file; the ending of its name says how it is packed."""
    if str(path).endswith(".gz"):
        return _gzip_chunks(path, reader)
    if str(path).endswith(".zst"):
        return _zstd_chunks(path, reader)
    return iter(lambda: reader.read(_READ_BYTES), b"")


def _gzip_chunks(path: str | Path, reader: HashingReader) -> Iterator[bytes]:
    import gzip

    try:
        with gzip.GzipFile(fileobj=reader) as stream:  # type: ignore[call-overload]
            while chunk := stream.read(_READ_BYTES):
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, error) from error


def _zstd_chunks(path: str | Path, reader: HashingReader) -> Iterator[bytes]:
    """Frame by frame: unlike the library's stream reader this notices a frame cut short."""
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise UserError(f"{path} needs the package zstandard: install it or unpack it") from error

    decompressor = zstandard.ZstdDecompressor()
    frame = None
    try:
        while data := reader.read(_READ_ZSTD_BYTES):
            while data:
                frame = frame or decompressor.decompressobj()
                if chunk := frame.decompress(data):
                    yield chunk
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise _damaged(path, error) from error
    if frame is not None:
        raise _damaged(path, EOFError("the last frame is cut short"))


def _damaged(path: str | Path, error: Exception) -> UserError:
    return UserError(f"{path} is damaged or cut short ({error}): fetch or compress it again")


def split_lines(block: bytes) -> Sequence[bytes | memoryview]:
    """The lines of a block without their ends; those of a large block are not copied."""
    if len(block) < _LARGE_BLOCK:
        lines = block.split(b"\n")
        return lines if lines[-1] else lines[:-1]
    view, start = memoryview(block), 0
    found: list[bytes | memoryview] = []
    while start < len(block):
        end = block.find(b"\n", start)
        end = len(block) if end < 0 else end
        found.append(view[start:end])
        start = end + 1
    return found


def parse_block(block: bytes, text_key: str) -> ParsedBlock:
    """Takes the texts out of a block of JSON lines."""
    parsed = ParsedBlock([], [], [], 0, 0)
    for number, line in enumerate(split_lines(block), start=1):
        parsed.lines = number
        if not line or (len(line) < _LONGEST_BLANK and bytes(line).isspace()):
            parsed.blank_lines += 1
            continue
        text = _parse_line(line, text_key)
        if isinstance(text, Defect):
            parsed.issues.append(Issue(number, text))
        else:
            parsed.texts.append(text)
            parsed.text_lines.append(number)
    return parsed


def parse_object(line: bytes | memoryview) -> dict[str, Any] | Defect:
    """The line's object, or what is wrong with it; what Python's own parser takes is taken."""
    try:
        document = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:  # NaN, a byte order mark, half a surrogate pair: Python takes them
            document = json.loads(bytes(line))
        except (ValueError, RecursionError):
            return Defect.MALFORMED
    return document if isinstance(document, dict) else Defect.NOT_OBJECT


def _parse_line(line: bytes | memoryview, text_key: str) -> bytes | Defect:
    """The line's text as UTF-8, or what is wrong with it."""
    document = parse_object(line)
    if isinstance(document, Defect):
        return document
    return text_of(document, text_key)


def text_of(document: dict[str, Any], text_key: str) -> bytes | Defect:
    """The text under the key as UTF-8, or what is wrong with it."""
    if text_key not in document:
        return Defect.MISSING_KEY
    text = document[text_key]
    if not isinstance(text, str):
        return Defect.NOT_STRING
    try:
        return text.encode() or Defect.EMPTY
    except UnicodeEncodeError:
        return Defect.NOT_UNICODE


def read_texts(paths: Iterable[Path], text_key: str) -> Iterator[str]:
    """Yields every usable text of JSON lines files, passing over unusable lines."""
    for path in paths:
        with open_input(path) as raw:
            for block in read_blocks(path, HashingReader(raw), _READ_BYTES):
                for text in parse_block(block, text_key).texts:
                    yield text.decode()


def open_input(path: Path) -> BinaryIO:
    """Opens an input file; UserError if it cannot be read."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read the input {path}: {error.strerror}") from error
