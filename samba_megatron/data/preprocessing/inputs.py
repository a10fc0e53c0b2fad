"""Finds the input files: paths, folders, globs and fsspec URLs, each file once and in order."""

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

from samba_megatron.data import jsonl
from samba_megatron.platform.errors import UserError

_UNPACKED = 3
"""How much more text a compressed file holds than its size, about: only balances the shards."""


class Kind(StrEnum):
    """How documents lie in a file."""

    JSONL = "JSON lines"
    PARQUET = "parquet"
    TEXT = "plain text"


_KINDS = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), Kind.JSONL),
    ".txt": Kind.TEXT,
    ".text": Kind.TEXT,
}
_PACKINGS = (".gz", ".zst")
_KNOWN = ".jsonl, .json, .txt (each also with .gz or .zst) and .parquet"


@dataclass(frozen=True)
class InputFile:
    """An input, as it was when the work was planned."""

    path: str
    """Absolute, or an fsspec URL."""
    size: int
    """Bytes on disk, compressed or not."""
    stamp: str
    """Changes when the file does: its time of last modification, or what the store says."""

    @property
    def kind(self) -> Kind:
        """How documents lie in it, by the ending of its name."""
        kind = kind_of(self.path)
        assert kind is not None
        return kind

    @property
    def packed(self) -> bool:
        """Whether it can only be read from its start to its end."""
        return self.path.endswith(_PACKINGS)

    @property
    def text_bytes(self) -> int:
        """The text it holds, about."""
        return self.size * (_UNPACKED if self.packed or self.kind is Kind.PARQUET else 1)


def kind_of(name: str) -> Kind | None:
    """What a file with this name holds; None: nothing that is read here."""
    bare = os.path.basename(name.split("::")[0])
    stem, ending = os.path.splitext(bare)
    if ending == ".parquet":
        return Kind.PARQUET
    if ending in _PACKINGS:
        ending = os.path.splitext(stem)[1]
    return _KINDS.get(ending)


def find_inputs(patterns: Iterable[str]) -> tuple[list[InputFile], list[str]]:
    """The files that ``patterns`` name, each once, in order; folders give all files below them.

    Returns:
        The inputs, and the names of other files that lie in the folders and are not read.

    Raises:
        UserError: a pattern names nothing, or a file is of no kind that is read here.
    """
    found: dict[str, InputFile] = {}
    passed_over: list[str] = []
    for pattern in patterns:
        is_folder, entries = _remote(pattern) if is_url(pattern) else _local(pattern)
        known = [entry for entry in entries if kind_of(entry.path)]
        others = [entry.path for entry in entries if not kind_of(entry.path)]
        if others and not is_folder:
            raise UserError(f"{others[0]} is not among {_KNOWN}: name files of these kinds")
        if not known:
            raise UserError(f"the folder {pattern} holds no files of the kinds {_KNOWN}")
        passed_over += others
        found.update((entry.path, entry) for entry in known)
    return list(found.values()), passed_over


def is_url(name: str) -> bool:
    """Whether fsspec, not the operating system, opens this."""
    return "://" in name


def _local(pattern: str) -> tuple[bool, list[InputFile]]:
    """What a path or glob names; whether all of it came out of folders."""
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches and os.path.exists(pattern):  # a name with brackets is not a pattern
        matches = [pattern]
    if not matches:
        raise UserError(f"no file matches the input {pattern}")
    folders = [name for name in matches if os.path.isdir(name)]
    files = [name for name in matches if name not in folders]
    # Of a glob such as corpus/** the folders are named beside what lies in them.
    is_folder = not files
    for folder in folders if is_folder else []:
        files += sorted(_files_below(folder))
    return is_folder, [_local_file(name) for name in files]


def _files_below(folder: str) -> Iterator[str]:
    for where, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (os.path.join(where, name) for name in names if not name.startswith("."))


def _local_file(name: str) -> InputFile:
    with open_input(name) as raw:
        status = os.fstat(raw.fileno())
    return InputFile(os.path.abspath(name), status.st_size, str(status.st_mtime_ns))


def _remote(url: str) -> tuple[bool, list[InputFile]]:
    """What an fsspec URL names; whether it is a folder."""
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(url)
        is_folder = filesystem.isdir(path)
        if is_folder:
            matches = sorted(filesystem.find(path))
        else:
            matches = sorted(filesystem.glob(path)) if glob.has_magic(path) else [path]
        entries = [_remote_file(filesystem, url, match) for match in matches]
    except FileNotFoundError as error:
        raise UserError(f"no file matches the input {url}") from error
    except Exception as error:  # each file system has errors of its own
        raise UserError(f"cannot read the input {url}: {error or type(error).__name__}") from error
    if not entries:
        raise UserError(f"no file matches the input {url}")
    return is_folder, entries


def _remote_file(filesystem: Any, url: str, match: str) -> InputFile:
    information = filesystem.info(match)
    stamp = next(
        (str(information[key]) for key in ("ETag", "etag", "mtime", "CRC") if key in information),
        str(information.get("created", "")),
    )
    first, *chained = url.split("::")
    name = "::".join([f"{first.split('://')[0]}://{match.lstrip('/')}", *chained])
    if first.startswith(("file://", "local://", "memory://")):
        name = f"{first.split('://')[0]}://{match}"
    return InputFile(name, int(information["size"]), stamp)


def open_input(name: str | Path) -> BinaryIO:
    """Opens an input file to read its raw bytes; UserError if it cannot be read."""
    if not is_url(str(name)):
        return jsonl.open_input(Path(name))
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(str(name))
        stream = filesystem.open(path, "rb")
        stream.archive = filesystem  # an archive is closed with its file system
        return stream
    except OSError as error:
        raise UserError(f"cannot read the input {name}: {error.strerror or error}") from error
