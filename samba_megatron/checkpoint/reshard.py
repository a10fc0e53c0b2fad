"""Rewrites a checkpoint: other files, weights only, another dtype. No model, no process group.

A checkpoint loads at any layout as it is, so nothing here depends on one. What a large run leaves
is many files, a few a rank, most of whose bytes are the optimizer's; what travels to another
machine, or is started from again and again, should be few files in the order of the layers, and
often the weights alone. The pieces that the ranks have cut tensors into stay as they are: their
bytes are copied, so no memory is needed for more than one piece, and a layout finds what it reads.
"""

import io
import pickle
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata, TensorStorageMetadata

from samba_megatron.checkpoint import folder, manifest
from samba_megatron.checkpoint.huggingface.folders import finished_at_end, require_new
from samba_megatron.checkpoint.huggingface.tensors import KEPT_IN_FP32
from samba_megatron.platform import files
from samba_megatron.platform.errors import UserError
from samba_megatron.platform.progress import byte_progress

_FORMAT = "metadata.json"
_COMMON_STATE = "common_state/"
# Of a rank or of the optimizer: what a checkpoint of weights leaves behind.
_STATE_OF_TRAINING = ("optimizer.", "rng/", "rerun_state_machine")
_NUMBERS = re.compile(r"(\d+)")
_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class ReshardOptions:
    """What to rewrite, and how."""

    checkpoint: Path
    """A checkpoint, or a folder of checkpoints (its latest is taken)."""
    output: Path
    """Folder of one checkpoint to make: absent or empty."""
    weights_only: bool = False
    """Leave out optimizer, random generators and the rerun state machine."""
    dtype: torch.dtype | None = None
    """Dtype of the weights; as they are when unset. A_log, D and the bias of dt_proj keep theirs.
    Only with ``weights_only``: the optimizer's main copies would not be of these weights."""
    file_bytes: int = 5_000_000_000
    """Largest file, but for a larger piece."""


@dataclass(frozen=True)
class ReshardReport:
    """What a rewriting has made."""

    path: Path
    pieces: int
    files: int
    bytes: int
    """Size of all pieces."""
    source_files: int
    source_bytes: int
    seconds: float
    """With the comparison."""


class _Pieces:
    """A checkpoint's pieces (parts of tensors, and objects), by their index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Metadata = FileSystemReader(path).read_metadata()
        self._open: tuple[str, IO[bytes]] | None = None

    def read(self, index: Any) -> bytes:
        """The bytes of a piece."""
        place = self.metadata.storage_data[index]
        if self._open is None or self._open[0] != place.relative_path:
            self.close()
            self._open = place.relative_path, (self.path / place.relative_path).open("rb")
        self._open[1].seek(place.offset)
        return self._open[1].read(place.length)

    def close(self) -> None:
        """Closes the file read last."""
        if self._open is not None:
            self._open[1].close()
            self._open = None


class _Files:
    """Data files of at most so many bytes, and where in them each piece lies."""

    def __init__(self, target: Path, file_bytes: int) -> None:
        self._target, self._limit = target, file_bytes
        self._file: IO[bytes] | None = None
        self._name, self._size, self._checksum = "", 0, 0
        self.places: dict[Any, Any] = {}
        self.checksums: dict[str, str] = {}

    def add(self, index: Any, place: Any, data: bytes) -> None:
        """Appends a piece that ``place`` describes in its old file."""
        if self._file is None or (self._size and self._size + len(data) > self._limit):
            self.close()
            self._name = f"__0_{len(self.checksums)}.distcp"
            self._file = (self._target / self._name).open("xb")
        self._file.write(data)
        self.places[index] = replace(
            place, relative_path=self._name, offset=self._size, length=len(data)
        )
        self._size += len(data)
        self._checksum = zlib.crc32(data, self._checksum)

    def close(self) -> None:
        """Puts the file under way on disk."""
        if self._file is None:
            return
        self._file.close()
        files.sync(self._target / self._name)
        self.checksums[self._name] = f"{self._checksum:08x}"
        self._file, self._size, self._checksum = None, 0, 0


def reshard(options: ReshardOptions, notice: Callable[[str], None]) -> ReshardReport:
    """Writes ``output``, a folder of one checkpoint of the same step, and compares every piece.

    Args:
        options: what to rewrite.
        notice: gets sentences for people.

    Raises:
        UserError: nothing was written, because of what the message says.
        RuntimeError: what was written is not what was read.
    """
    started = time.monotonic()
    require_new(options.output.absolute())
    if options.dtype is not None and not options.weights_only:
        raise UserError(
            "another dtype is for weights alone (the optimizer keeps copies of them): add "
            "--weights-only"
        )
    found = folder.find_named(options.checkpoint)
    for text in found.notices:
        notice(text)
    with folder.reading(found.path):
        _refuse_damaged(found, notice)
        source = _Pieces(found.path)
        kept = _kept(source.metadata, options.weights_only)
        with finished_at_end(options.output) as unfinished:
            _require_space(unfinished, source, kept)
            writing = folder.begin(unfinished, found.manifest.step)
            written = _copy(source, kept, writing, options)
            _compare(source, _Pieces(writing), kept, options.dtype)
            _write_manifest(writing, found.manifest, written, kept)
            folder.publish(writing)
    return ReshardReport(
        path=options.output / folder.checkpoint_name(found.manifest.step),
        pieces=len(kept),
        files=len(written.checksums),
        bytes=sum(place.length for place in written.places.values()),
        source_files=sum(name.endswith(".distcp") for name in found.manifest.files),
        source_bytes=found.manifest.bytes,
        seconds=time.monotonic() - started,
    )


def _refuse_damaged(found: folder.Found, notice: Callable[[str], None]) -> None:
    """A copy gets checksums of its own: damage must not be copied with them."""
    notice("checking the checksums of what is read")
    problem = manifest.damage(found.path, found.manifest, sorted(found.manifest.checksums))
    if problem is not None:
        raise UserError(f"checkpoint {found.path} is corrupt: {problem}; take another one")


def _kept(metadata: Metadata, weights_only: bool) -> list[Any]:
    """The pieces to be copied: weights first, in the order of the layers."""
    dropped = _STATE_OF_TRAINING if weights_only else ()
    indices = (index for index in metadata.storage_data if not index.fqn.startswith(dropped))
    return sorted(indices, key=_order)


def _order(index: Any) -> tuple[Any, ...]:
    """Numbers by value; what is no weight comes last."""
    texts = _NUMBERS.split(index.fqn)
    parts = [(int(text), "") if text.isdigit() else (-1, text) for text in texts]
    offsets = () if index.offset is None else tuple(index.offset)
    return index.fqn.startswith(_STATE_OF_TRAINING), parts, offsets


def _require_space(target: Path, source: _Pieces, kept: list[Any]) -> None:
    needed = sum(source.metadata.storage_data[index].length for index in kept)
    free = shutil.disk_usage(target).free
    if free < needed:
        raise UserError(
            f"the copy may need {needed / 1e9:.2f} GB but {target.parent} has {free / 1e9:.2f} GB "
            "free: make room or choose another output"
        )


def _copy(source: _Pieces, kept: list[Any], writing: Path, options: ReshardOptions) -> _Files:
    written = _Files(writing, options.file_bytes)
    storage = source.metadata.storage_data
    progress = byte_progress("copying", sum(storage[index].length for index in kept))
    for index, data in _converted(source, kept, options.dtype):
        written.add(index, storage[index], data)
        progress.add(storage[index].length)
    written.close()
    source.close()
    progress.close()
    keys = {index.fqn for index in kept}
    content = {
        key: _described(key, entry, options.dtype)
        for key, entry in source.metadata.state_dict_metadata.items()
        if key in keys
    }
    metadata = replace(source.metadata, state_dict_metadata=content, storage_data=written.places)
    with (writing / manifest.METADATA).open("xb") as file:
        pickle.dump(metadata, file)
    files.sync(writing / manifest.METADATA)
    shutil.copyfile(source.path / _FORMAT, writing / _FORMAT)
    files.sync(writing / _FORMAT)
    return written


def _converted(
    source: _Pieces, kept: list[Any], dtype: torch.dtype | None
) -> Iterator[tuple[Any, bytes]]:
    for index in kept:
        data = source.read(index)
        if _changes(index.fqn, source.metadata.state_dict_metadata[index.fqn], dtype):
            buffer = io.BytesIO()
            torch.save(_tensor(data).to(dtype), buffer)
            data = buffer.getvalue()
        yield index, data


def _changes(key: str, entry: Any, dtype: torch.dtype | None) -> bool:
    return (
        dtype is not None
        and isinstance(entry, TensorStorageMetadata)
        and entry.properties.dtype in _DTYPES
        and entry.properties.dtype != dtype
        and not key.endswith(KEPT_IN_FP32)
    )


def _described(key: str, entry: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None or not _changes(key, entry, dtype):
        return entry
    return replace(entry, properties=replace(entry.properties, dtype=dtype))


def _tensor(data: bytes) -> torch.Tensor:
    tensor: torch.Tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return tensor


def _compare(source: _Pieces, copy: _Pieces, kept: list[Any], dtype: torch.dtype | None) -> None:
    """Reads back from the disk what was written; equal bit by bit, or rounded where converted."""
    progress = byte_progress(
        "comparing", sum(place.length for place in copy.metadata.storage_data.values())
    )
    different = []
    for index, wanted in _converted(source, kept, dtype):
        found = copy.read(index)
        if found != wanted:
            different.append(index.fqn)
        progress.add(len(found))
    source.close()
    copy.close()
    progress.close()
    if different:
        raise RuntimeError(f"the copy differs from {source.path} in {', '.join(different[:3])}")


def _write_manifest(
    writing: Path, source: manifest.Manifest, written: _Files, kept: list[Any]
) -> None:
    common = next(index for index in kept if index.fqn.startswith(_COMMON_STATE))
    place = written.places[common]
    digest = manifest.file_hash(writing / place.relative_path, place.offset, place.length)
    manifest.write_manifest(
        writing,
        replace(
            source,
            metadata_sha256=manifest.file_hash(writing / manifest.METADATA),
            common_state=manifest.Slice(place.relative_path, place.offset, place.length, digest),
            files=manifest.file_sizes(writing),
            checksums=written.checksums,
        ),
    )
