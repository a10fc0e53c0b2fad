"""What is known about datasets, remembered between starts.

With thousands of datasets, looking into each (sizes, a hash of the content, the largest token id)
takes minutes on a shared file system. What was found is kept in the index cache, under the sizes
and modification times of the files: a warm start asks the file system for those alone.
"""

import json
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from samba_megatron.data.best_fit import PackedSize, packed_size
from samba_megatron.data.indexed import (
    bin_path,
    check_dataset,
    check_vocabulary,
    fingerprint,
    idx_path,
    largest_sampled_id,
    sequence_lengths,
)
from samba_megatron.data.sample_index import cannot_write
from samba_megatron.platform.errors import UserError
from samba_megatron.platform.files import publish

_FILE_NAME = "catalogue.json"
_FORMAT = 1
_PARALLEL_LOOKS = 16
"""Datasets looked at together: with thousands of prefixes the file system's latency adds up."""
_SCANNED_CHUNKS = 4096
"""Chunks of 256 KiB looked at for token ids in all datasets together (and at most 64 in one)."""


@dataclass
class Facts:
    """What one dataset is."""

    prefix: str
    sequences: int
    documents: int
    tokens: int
    fingerprint: str
    """A hash of the content, the same for a copy elsewhere."""
    largest_id: int
    """The largest token id in what was looked at."""
    stamp: list[int]
    """Sizes and modification times of the files."""
    part_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens of parts that were asked for, by ``first:last`` sequence."""
    part_packed: dict[str, list[int]] = field(default_factory=dict)
    """What parts make when packed by best fit, by ``first:last`` and length of a sample."""


class Catalogue:
    """Facts about datasets, from the cache where the files have not changed since.

    Args:
        folder: the index cache; None remembers nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / _FILE_NAME if folder else None
        self._entries = _read(self._path) if self._path else {}
        self._changed = False

    def facts(self, prefixes: Sequence[str], vocab_size: int | None = None) -> list[Facts]:
        """The facts of each dataset.

        Args:
            prefixes: the datasets.
            vocab_size: refuse ids not below this.

        Raises:
            UserError: a dataset is missing, damaged, empty, or has ids outside the vocabulary.
        """
        chunks = max(2, min(64, _SCANNED_CHUNKS // max(len(prefixes), 1)))
        with ThreadPoolExecutor(_PARALLEL_LOOKS) as pool:
            found = list(pool.map(lambda prefix: self._look(prefix, chunks), prefixes))
        for facts in found:
            if vocab_size is not None:
                check_vocabulary(facts.prefix, facts.largest_id, vocab_size)
            key = os.path.abspath(facts.prefix)
            self._changed |= self._entries.get(key) is not facts
            self._entries[key] = facts
        return found

    def part_tokens(self, facts: Facts, first: int, last: int) -> int:
        """Tokens of the sequences ``first`` to ``last - 1``."""
        if (first, last) == (0, facts.sequences):
            return facts.tokens
        key = f"{first}:{last}"
        if key not in facts.part_tokens:
            lengths = sequence_lengths(facts.prefix)[first:last]
            facts.part_tokens[key] = int(lengths.sum(dtype=np.int64))
            self._changed = True
        return facts.part_tokens[key]

    def part_packed(self, facts: Facts, first: int, last: int, sequence_length: int) -> PackedSize:
        """What the sequences ``first`` to ``last - 1`` make when packed by best fit."""
        key = f"{first}:{last} {sequence_length}"
        if key not in facts.part_packed:
            lengths = sequence_lengths(facts.prefix)[first:last]
            facts.part_packed[key] = list(packed_size(lengths, sequence_length))
            self._changed = True
        return PackedSize(*facts.part_packed[key])

    def save(self) -> None:
        """Writes what is new to the cache; of two jobs that do so at once, one remains.

        Raises:
            UserError: the cache cannot be written.
        """
        if self._path is None or not self._changed:
            return
        entries = {key: asdict(facts) for key, facts in self._entries.items()}
        try:
            _replace(self._path, json.dumps({"format": _FORMAT, "datasets": entries}))
        except OSError as error:
            raise UserError(cannot_write(self._path.parent, error)) from error
        self._changed = False

    def _look(self, prefix: str, chunks: int) -> Facts:
        known = self._entries.get(os.path.abspath(prefix))
        if known is not None and known.stamp == _stamp(prefix):
            known.prefix = prefix
            return known
        info = check_dataset(prefix)
        return Facts(
            prefix=prefix,
            sequences=info.sequences,
            documents=info.documents,
            tokens=info.tokens,
            fingerprint=fingerprint(prefix),
            largest_id=largest_sampled_id(info, chunks),
            stamp=_stamp(prefix),
        )


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        temporary.write_text(text)
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _stamp(prefix: str) -> list[int]:
    """Sizes and times of both files; empty where one is missing."""
    try:
        states = [os.stat(path) for path in (idx_path(prefix), bin_path(prefix))]
    except OSError:
        return []
    return [number for state in states for number in (state.st_size, state.st_mtime_ns)]


def _read(path: Path) -> dict[str, Facts]:
    """The catalogue on disk; an unreadable one is an empty one."""
    try:
        content: Any = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            return {}
        return {key: Facts(**entry) for key, entry in content["datasets"].items()}
    except (OSError, ValueError, TypeError, KeyError):
        return {}
