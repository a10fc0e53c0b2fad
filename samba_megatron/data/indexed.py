"""Megatron's indexed dataset files: a streaming writer, an inspector and a check.

A dataset at prefix ``P`` is two files. ``P.bin`` holds the token ids of all documents one after
another. ``P.idx`` (magic ``MMIDIDX``, version 1, little-endian) holds a one-byte dtype code, the
counts of sequences and of document marks (uint64 each), then the sequence lengths (int32), their
byte offsets in ``P.bin`` (int64) and the document marks: the index of the first sequence of each
document, closed by the number of sequences (int64). Here a document is always one sequence.

The writer makes the same bytes as ``megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder``
but keeps no list in memory (the lengths of a trillion-token corpus are gigabytes) and publishes
both files at once. Only numpy is needed.
"""

import fcntl
import hashlib
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from samba_megatron.platform.errors import UserError
from samba_megatron.platform.files import publish, temporary_name

Tokens = npt.NDArray[Any]

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_CODES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_CHUNK = 1 << 20
"""Index entries handled at a time: bounds the memory of writing an index."""

_FINGERPRINT_BYTES = 1 << 18
_SCAN_CHUNKS = 64
_SCAN_CHUNK_BYTES = 1 << 18


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The dtype Megatron stores ids below ``vocab_size`` in: uint16 below 65,500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


def bin_path(prefix: str | Path) -> Path:
    """The data file of the dataset at ``prefix``."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The index file of the dataset at ``prefix``."""
    return Path(f"{prefix}.idx")


@dataclass(frozen=True)
class IndexInfo:
    """What an index file says of its dataset."""

    prefix: str
    dtype: np.dtype[Any]
    sequences: int
    documents: int
    tokens: int


class IndexedWriter:
    """Writes a dataset document by document; :meth:`finish` publishes it, the index last.

    Used as a context manager, leaving the block without :meth:`finish` removes what was written.
    Two writers of one prefix exclude each other.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        """Opens temporary files beside the target.

        Raises:
            UserError: the folder cannot be written, or another process is writing this dataset.
        """
        self._prefix = str(prefix)
        self._dtype = np.dtype(dtype)
        self._bin_temporary = temporary_name(bin_path(prefix))
        self._idx_temporary = temporary_name(idx_path(prefix))
        self._lengths_temporary = temporary_name(Path(f"{prefix}.lengths"))
        try:
            self._bin_temporary.parent.mkdir(parents=True, exist_ok=True)
            self._bin = _open_exclusively(self._bin_temporary)
        except OSError as error:
            raise UserError(f"cannot write {bin_path(prefix)}: {error.strerror}") from error
        self._lengths = open(self._lengths_temporary, "wb+")  # noqa: SIM115 (closed by discard)
        self.documents = 0
        self.tokens = 0
        self.max_token_id = -1
        self._digest = hashlib.sha256()

    @property
    def bin_sha256(self) -> str:
        """SHA-256 of the data file as written so far."""
        return self._digest.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.discard()

    def add_document(self, tokens: Tokens) -> None:
        """Appends one document, an array of token ids ``[n]``."""
        self.add(tokens, np.array([len(tokens)]))

    def add(self, tokens: Tokens, lengths: npt.NDArray[np.integer[Any]]) -> None:
        """Appends documents that lie one after another.

        Args:
            tokens: their token ids ``[sum(lengths)]``, any integer type.
            lengths: tokens in each document ``[documents]``.

        Raises:
            ValueError: the lengths do not sum to the tokens, or an id does not fit the dtype.
        """
        if int(lengths.sum()) != len(tokens):
            raise ValueError(f"lengths sum to {lengths.sum()}, but there are {len(tokens)} tokens")
        if len(tokens):
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high > np.iinfo(self._dtype).max:
                raise ValueError(f"token ids {low}..{high} do not fit {self._dtype}")
            self.max_token_id = max(self.max_token_id, high)
        content = np.ascontiguousarray(tokens, dtype=self._dtype).data
        self._digest.update(content)
        self._bin.write(content)
        self._lengths.write(np.ascontiguousarray(lengths, dtype=np.int32).data)
        self.documents += len(lengths)
        self.tokens += len(tokens)

    def finish(self) -> IndexInfo:
        """Writes the index and publishes both files.

        An old index at the prefix is removed first: at no moment does an index lie beside a data
        file that it does not describe.
        """
        self._bin.flush()
        with open(self._idx_temporary, "wb") as index:
            self._write_index(index)
        old_index = idx_path(self._prefix)
        old_index.unlink(missing_ok=True)
        publish(self._bin_temporary, bin_path(self._prefix))
        publish(self._idx_temporary, old_index)
        self.discard()
        return IndexInfo(self._prefix, self._dtype, self.documents, self.documents, self.tokens)

    def discard(self) -> None:
        """Closes and removes the temporary files; harmless after :meth:`finish`."""
        if self._bin.closed:
            return
        self._lengths.close()
        for path in (self._bin_temporary, self._idx_temporary, self._lengths_temporary):
            path.unlink(missing_ok=True)
        self._bin.close()

    def _write_index(self, index: BinaryIO) -> None:
        code = next(c for c, kind in _DTYPE_CODES.items() if np.dtype(kind) == self._dtype)
        index.write(_HEADER.pack(_MAGIC, _VERSION, code, self.documents, self.documents + 1))
        for lengths in self._spooled_lengths():
            index.write(lengths.data)
        position = 0
        for lengths in self._spooled_lengths():
            ends = position + np.cumsum(lengths, dtype=np.int64) * self._dtype.itemsize
            index.write(np.concatenate([[position], ends[:-1]]).astype(np.int64).data)
            position = int(ends[-1])
        for first in range(0, self.documents + 1, _CHUNK):
            last = min(first + _CHUNK, self.documents + 1)
            index.write(np.arange(first, last, dtype=np.int64).data)

    def _spooled_lengths(self) -> Iterator[npt.NDArray[np.int32]]:
        self._lengths.seek(0)
        while block := self._lengths.read(_CHUNK * 4):
            yield np.frombuffer(block, dtype=np.int32)


def _open_exclusively(path: Path) -> BinaryIO:
    """Opens ``path`` empty for writing; UserError if another process has it open this way."""
    stream = open(path, "ab")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.close()
        raise UserError(f"another process is writing {path}: wait for it or stop it") from None
    except OSError:
        pass  # a file system without locks: two writers at once are then the user's care
    stream.truncate(0)
    return stream


def read_index(prefix: str | Path) -> IndexInfo:
    """Reads a dataset's counts without reading its data.

    Raises:
        UserError: the index is missing, foreign or truncated.
    """
    lengths, pointers, marks, dtype = map_index(prefix)
    tokens = int(pointers[-1]) // dtype.itemsize + int(lengths[-1]) if len(lengths) else 0
    return IndexInfo(str(prefix), dtype, len(lengths), len(marks) - 1, tokens)


def sequence_lengths(prefix: str | Path) -> npt.NDArray[np.int32]:
    """Tokens in each sequence ``[sequences]``, memory-mapped."""
    return map_index(prefix)[0]


def map_index(
    prefix: str | Path,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64], np.dtype[Any]]:
    """Maps an index: sequence lengths, byte offsets, document marks, and the data's dtype.

    Raises:
        UserError: the index is missing, foreign or truncated.
    """
    path = idx_path(prefix)
    try:
        with open(path, "rb") as stream:
            header = stream.read(_HEADER.size)
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise UserError(_missing(prefix, path, error)) from error
    if not header.startswith(_MAGIC) or len(header) < _HEADER.size:
        raise UserError(f"{path} is not a Megatron index file: write it again from its documents")
    _, version, code, sequences, marks = _HEADER.unpack(header)
    if version != _VERSION or code not in _DTYPE_CODES:
        raise UserError(f"{path} has version {version} and dtype code {code}: expected version 1")
    if size < _HEADER.size + sequences * 12 + marks * 8:
        raise UserError(f"{path} is truncated ({size} bytes): preprocess the corpus again")
    raw = np.memmap(path, mode="r", dtype=np.uint8)
    pointers_at = _HEADER.size + sequences * 4
    marks_at = pointers_at + sequences * 8
    document_marks = np.frombuffer(raw, np.int64, marks, marks_at)
    if marks == 0 or document_marks[-1] != sequences:
        raise UserError(f"{path} is damaged (its documents do not end at its last sequence)")
    return (
        np.frombuffer(raw, np.int32, sequences, _HEADER.size),
        np.frombuffer(raw, np.int64, sequences, pointers_at),
        document_marks,
        np.dtype(_DTYPE_CODES[code]),
    )


def _missing(prefix: str | Path, path: Path, error: OSError) -> str:
    if str(prefix).endswith((".bin", ".idx")):
        return f"{prefix} is a file of a dataset: give its prefix, {str(prefix)[:-4]}"
    remedy = shards_remedy(prefix) or "give the prefix of a preprocessed dataset"
    return f"cannot read {path} ({error.strerror}): {remedy}"


def shard_prefix(prefix: str | Path, number: int) -> str:
    """Of one dataset of a corpus that became several."""
    return f"{prefix}_{number:05d}"


def corpus_of(prefix: str) -> str:
    """The prefix of the corpus that a shard is of; a dataset's own where it is none."""
    return re.sub(r"_\d{5}$", "", prefix)


def shards_remedy(prefix: str | Path) -> str | None:
    """What to give in place of the prefix of a corpus that became several datasets, if it did."""
    if not idx_path(shard_prefix(prefix, 0)).is_file():
        return None
    return (
        f"it is a corpus of several datasets, give its blend file {prefix}.blend.yaml (a run takes "
        "it in data.blend_file, or in data.valid_data_path)"
    )


def check_dataset(prefix: str | Path, vocab_size: int | None = None) -> IndexInfo:
    """Makes sure that a dataset can be trained on, before anything slow starts.

    Args:
        prefix: the dataset.
        vocab_size: refuse ids not below this; up to 16 MiB spread over the data are looked at.

    Raises:
        UserError: a file is missing, truncated or not the other's, the dataset is empty, or an id
            is outside the vocabulary.
    """
    info = read_index(prefix)
    data = bin_path(prefix)
    try:
        size = data.stat().st_size
    except OSError as error:
        raise UserError(_missing(prefix, data, error)) from error
    if info.tokens == 0 or info.documents == 0:
        raise UserError(f"the dataset {prefix} is empty: preprocess a corpus that has documents")
    if size != info.tokens * info.dtype.itemsize:
        raise UserError(
            f"{data} has {size} bytes but its index describes {info.tokens * info.dtype.itemsize}: "
            "it is truncated or of another run, preprocess the corpus again"
        )
    if vocab_size is not None:
        check_vocabulary(prefix, largest_sampled_id(info), vocab_size)
    return info


def check_vocabulary(prefix: str | Path, largest_id: int, vocab_size: int) -> None:
    """Refuses a dataset whose largest id is not below ``vocab_size``, with a UserError."""
    if largest_id >= vocab_size:
        raise UserError(
            f"the dataset {prefix} holds token id {largest_id}, outside the model's vocabulary of "
            f"{vocab_size}: raise the model's vocab_size or use the matching tokenizer"
        )


def largest_sampled_id(info: IndexInfo, chunks: int = _SCAN_CHUNKS) -> int:
    """The largest id in evenly spread chunks of 256 KiB, in all of a dataset that is small."""
    tokens = np.memmap(bin_path(info.prefix), mode="r", dtype=info.dtype)
    chunk = _SCAN_CHUNK_BYTES // info.dtype.itemsize
    starts = range(0, info.tokens, max(chunk, info.tokens // chunks))
    return max(int(tokens[start : start + chunk].max()) for start in starts)


def fingerprint(prefix: str | Path) -> str:
    """A hash that tells datasets apart in constant time, the same for a copy on another disk.

    It covers the sizes of both files and the first and last 256 KiB of each, not every byte.
    """
    digest = hashlib.sha256()
    for path in (idx_path(prefix), bin_path(prefix)):
        try:
            with open(path, "rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                digest.update(struct.pack("<Q", size))
                digest.update(stream.read(_FINGERPRINT_BYTES))
                stream.seek(max(0, size - _FINGERPRINT_BYTES))
                digest.update(stream.read(_FINGERPRINT_BYTES))
        except OSError as error:
            raise UserError(_missing(prefix, path, error)) from error
    return digest.hexdigest()
