"""safetensors files, written and read one tensor at a time.

The format: 8 bytes with the header's length, the header (JSON: dtype, shape and place of every
tensor), then the tensors' bytes. As shapes are known beforehand, the header comes first and the
tensors follow as they are made; the package's own writer wants a file's tensors all at once.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from samba_megatron.platform.errors import UserError

if TYPE_CHECKING:
    import torch

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: "torch.dtype"

    @property
    def bytes(self) -> int:
        """Its size."""
        size = self.dtype.itemsize
        for extent in self.shape:
            size *= extent
        return size


@dataclass
class _Shard:
    entries: list[TensorEntry] = field(default_factory=list)
    bytes: int = 0


class ShardWriter:
    """Writes tensors, in the order announced, into one file or several and their index."""

    def __init__(self, folder: Path, entries: Iterable[TensorEntry], shard_bytes: int) -> None:
        """Args:
        folder: exists.
        entries: all tensors to come, in order.
        shard_bytes: no file gets more tensor bytes, unless one tensor alone has.
        """
        self._folder = folder
        self._shards = _plan(entries, shard_bytes)
        self._queue = [
            (self._file_name(number), position, entry)
            for number, shard in enumerate(self._shards)
            for position, entry in enumerate(shard.entries)
        ]
        self._next = 0
        self._file: IO[bytes] | None = None

    @property
    def total_bytes(self) -> int:
        """Size of all tensors."""
        return sum(shard.bytes for shard in self._shards)

    def write(self, name: str, tensor: "torch.Tensor") -> None:
        """Writes the next tensor.

        Raises:
            RuntimeError: if it is not the one announced.
        """
        import torch

        file_name, position, entry = self._queue[self._next]
        if (name, tuple(tensor.shape), tensor.dtype) != (entry.name, entry.shape, entry.dtype):
            raise RuntimeError(f"{name} {tensor.shape} {tensor.dtype} is not {entry}")
        if position == 0:
            self._open(file_name)
        assert self._file is not None
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        self._file.write(memoryview(data.numpy()))
        self._next += 1

    def close(self) -> None:
        """Puts everything on disk, and the index beside it."""
        if self._next != len(self._queue):
            raise RuntimeError(f"{len(self._queue) - self._next} tensors were not written")
        self._close_file()
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": self.total_bytes},
                "weight_map": {entry.name: file for file, _, entry in self._queue},
            }
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _file_name(self, number: int) -> str:
        if len(self._shards) == 1:
            return SINGLE
        return f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"

    def _open(self, file_name: str) -> None:
        self._close_file()
        shard = next(
            shard
            for number, shard in enumerate(self._shards)
            if self._file_name(number) == file_name
        )
        self._file = (self._folder / file_name).open("wb")
        self._file.write(_header(shard.entries))

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def _plan(entries: Iterable[TensorEntry], shard_bytes: int) -> list[_Shard]:
    shards = [_Shard()]
    for entry in entries:
        if shards[-1].entries and shards[-1].bytes + entry.bytes > shard_bytes:
            shards.append(_Shard())
        shards[-1].entries.append(entry)
        shards[-1].bytes += entry.bytes
    return shards


def _header(entries: list[TensorEntry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": _DTYPES[str(entry.dtype).removeprefix("torch.")],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.bytes],
        }
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True)
class _Place:
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


class ShardReader:
    """The tensors of a Hugging Face folder, by name.

    They are read, not mapped into memory: a mapped file's pages would count as this process's.
    """

    def __init__(self, folder: Path) -> None:
        """Raises:
        UserError: there are no safetensors, a file is missing or is not whole.
        """
        self._places: dict[str, _Place] = {}
        for file_name in _file_names(folder):
            self._places |= _read_header(folder / file_name)

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._places[name].shape

    def dtype(self, name: str) -> str:
        """Its dtype, in the format's letters (``BF16``)."""
        return self._places[name].dtype

    def read(self, name: str) -> "torch.Tensor":
        """The tensor; its dtype must be one of a float."""
        import torch

        place = self._places[name]
        letters = {letters: dtype for dtype, letters in _DTYPES.items()}
        tensor = torch.empty(place.shape, dtype=getattr(torch, letters[place.dtype]))
        with place.file.open("rb", buffering=0) as file:
            file.seek(place.start)
            target = memoryview(tensor.view(-1).view(torch.uint8).numpy())
            while target:
                count = file.readinto(target)
                if not count:
                    raise UserError(f"{place.file} has become shorter: copy it again")
                target = target[count:]
        return tensor


def _read_header(path: Path) -> dict[str, _Place]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            header: dict[str, Any] = json.loads(file.read(length) if length < size else b"")
        places = {
            name: _Place(
                path,
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except FileNotFoundError:
        raise UserError(f"{path} is missing, which {INDEX} names: copy all files") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a safetensors file: copy it again") from None
    end = max((place.start + place.bytes for place in places.values()), default=8 + length)
    if end != size:
        raise UserError(f"{path} has {size:,} bytes and should have {end:,}: copy it again")
    return places


def _file_names(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        try:
            return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"{folder / INDEX} cannot be read ({error!r})") from None
    if (folder / SINGLE).is_file():
        return [SINGLE]
    raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}: only safetensors can be read")
