"""Looks into an indexed dataset: what is in it, and whether it is whole.

A user's question is "is this the data that I think it is?": counts, lengths, single documents as
text, and whether the files agree with each other and with the manifest of the run that made them.
Everything is read in chunks; memory does not grow with the dataset.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from samba_megatron.data.indexed import bin_path, idx_path, map_index, shards_remedy
from samba_megatron.data.manifest import DatasetRecord, Manifest, read_manifest
from samba_megatron.platform.errors import UserError
from samba_megatron.platform.files import atomic_write

_CHUNK = 1 << 22
_MOST_EXACT = 50_000_000
"""Documents up to which the quantiles of lengths are exact; of more, every so many is taken."""

Progress = Callable[[int, int], None]
"""Told the bytes read and the bytes there are."""


@dataclass
class Inspection:
    """What was found in one dataset."""

    prefix: str
    documents: int = 0
    tokens: int = 0
    dtype: str = ""
    bytes: int = 0
    quantiles: dict[str, int] = field(default_factory=dict)
    """Document lengths in tokens: shortest, median, 90 %, 99 %, longest."""
    histogram: list[tuple[int, int, int, int]] = field(default_factory=list)
    """Lengths ``from`` (inclusive) ``to`` (exclusive): documents, and tokens in them."""
    largest_id: int | None = None
    """None where the tokens were not read."""
    checked: list[str] = field(default_factory=list)
    """What was compared and agreed, or not, in words."""
    problems: list[str] = field(default_factory=list)
    """What is wrong, a sentence each; empty for a whole dataset."""


def inspect_dataset(
    prefix: str,
    vocab_size: int | None = None,
    read_tokens: bool = True,
    progress: Progress | None = None,
) -> Inspection:
    """Counts and checks a dataset.

    Args:
        prefix: the dataset.
        vocab_size: every id must be below it; the manifest's where it is not given.
        read_tokens: read all of the data, for the ids and the hash.
        progress: told how far reading is.

    Raises:
        UserError: there is no dataset, or its manifest is not one.
    """
    for path in (idx_path(prefix), bin_path(prefix)):
        if not path.is_file():
            remedy = shards_remedy(prefix) or "give the prefix of a dataset"
            raise UserError(f"{path} does not exist: {remedy}")
    found = Inspection(
        prefix, bytes=sum(map(os.path.getsize, (bin_path(prefix), idx_path(prefix))))
    )
    manifest = read_manifest(prefix)
    try:
        lengths, pointers, marks, dtype = map_index(prefix)
    except UserError as damage:
        found.problems.append(str(damage))
        return found
    found.documents, found.dtype = len(marks) - 1, str(dtype)
    _check_index(found, lengths, pointers, marks, dtype)
    if not found.problems:
        _measure_lengths(found, lengths, marks)
    if read_tokens and not found.problems:
        vocab_size = vocab_size or (manifest.tokenizer.get("vocab_size") if manifest else None)
        _check_tokens(found, dtype, vocab_size, _record(manifest, prefix), progress)
    if manifest is not None:
        _check_manifest(found, manifest)
    return found


def _check_index(
    found: Inspection,
    lengths: npt.NDArray[np.int32],
    pointers: npt.NDArray[np.int64],
    marks: npt.NDArray[np.int64],
    dtype: np.dtype[Any],
) -> None:
    """Lengths, pointers and marks agree with each other and with both files' sizes."""
    idx, data = idx_path(found.prefix), bin_path(found.prefix)
    described = 34 + 12 * len(lengths) + 8 * len(marks)
    if os.path.getsize(idx) != described:
        found.problems.append(
            f"{idx} has {os.path.getsize(idx)} bytes, its header says {described}"
        )
    position = 0
    for start in range(0, len(lengths), _CHUNK):
        part = lengths[start : start + _CHUNK].astype(np.int64)
        if part.min() < 0:
            found.problems.append(f"{idx} has a document of negative length")
            return
        begins = position + np.cumsum(part * dtype.itemsize) - part * dtype.itemsize
        wrong = np.flatnonzero(begins != pointers[start : start + _CHUNK])
        if len(wrong):
            found.problems.append(
                f"{idx}: sequence {start + wrong[0]} does not begin where the one before it ends"
            )
            return
        position += int(part.sum()) * dtype.itemsize
    found.tokens = position // dtype.itemsize
    if os.path.getsize(data) != position:
        found.problems.append(
            f"{data} has {os.path.getsize(data)} bytes, its index describes {position}"
        )
    for start in range(0, len(marks) - 1, _CHUNK):
        if (np.diff(marks[start : start + _CHUNK + 1]) < 0).any() or marks[0] != 0:
            found.problems.append(f"{idx}: its documents are not in order")
            return
    found.checked.append("index: sizes, lengths, pointers, documents")


def _document_lengths(
    lengths: npt.NDArray[np.int32], marks: npt.NDArray[np.int64]
) -> Iterator[npt.NDArray[np.int64]]:
    """Tokens of each document, chunk by chunk; a document may be several sequences."""
    for start in range(0, len(marks) - 1, _CHUNK):
        ends = marks[start : start + _CHUNK + 1]
        first = int(ends[0])
        sums = np.concatenate([[0], np.cumsum(lengths[first : int(ends[-1])], dtype=np.int64)])
        yield np.diff(sums[ends - first])


def _measure_lengths(
    found: Inspection, lengths: npt.NDArray[np.int32], marks: npt.NDArray[np.int64]
) -> None:
    """The histogram by powers of two, and quantiles."""
    documents, tokens = np.zeros(65, np.int64), np.zeros(65, np.int64)
    every = max(1, -(-found.documents // _MOST_EXACT))
    sample, longest, shortest = [np.zeros(0, np.int64)], 0, None
    for part in _document_lengths(lengths, marks):
        power = np.where(part > 0, np.frexp(part.astype(np.float64))[1], 0)
        documents += np.bincount(power, minlength=65)
        tokens += np.bincount(power, weights=part, minlength=65).astype(np.int64)
        sample.append(part[::every])
        longest = max(longest, int(part.max()))
        shortest = int(part.min()) if shortest is None else min(shortest, int(part.min()))
    if not found.documents:
        return
    middle = np.quantile(np.concatenate(sample), [0.5, 0.9, 0.99], method="nearest").tolist()
    names = ("shortest", "median", "90 %", "99 %", "longest")
    values = (shortest or 0, *middle, longest)
    found.quantiles = {name: int(value) for name, value in zip(names, values, strict=True)}
    used = np.flatnonzero(documents)
    found.histogram = [
        (1 << p >> 1, 1 << p, int(documents[p]), int(tokens[p]))
        for p in range(used[0], used[-1] + 1)
    ]


def _check_tokens(
    found: Inspection,
    dtype: np.dtype[Any],
    vocab_size: int | None,
    record: DatasetRecord | None,
    progress: Progress | None,
) -> None:
    """Reads the data once: the range of ids, and the hash where one is on record."""
    digest = hashlib.sha256() if record is not None and record.bin_sha256 else None
    total, done, smallest, largest = os.path.getsize(bin_path(found.prefix)), 0, 0, -1
    with open(bin_path(found.prefix), "rb") as stream:
        while block := stream.read(_CHUNK * dtype.itemsize):
            ids = np.frombuffer(block, dtype)
            smallest, largest = min(smallest, int(ids.min())), max(largest, int(ids.max()))
            if digest:
                digest.update(block)
            done += len(block)
            if progress:
                progress(done, total)
    found.largest_id = largest
    if smallest < 0:
        found.problems.append(f"{found.prefix} has the negative token id {smallest}")
    if vocab_size is None:
        found.checked.append("token ids: not negative (no vocabulary is known)")
    elif largest >= vocab_size:
        found.problems.append(
            f"{found.prefix} has token id {largest}, outside the vocabulary of {vocab_size}"
        )
    else:
        found.checked.append(f"token ids: all under the vocabulary of {vocab_size}")
    if digest and record:
        if digest.hexdigest() != record.bin_sha256:
            found.problems.append(
                f"{bin_path(found.prefix)} is not the file that the manifest describes: its hash "
                "differs"
            )
        found.checked.append("hash of the data against the manifest")


def _record(manifest: Manifest | None, prefix: str) -> DatasetRecord | None:
    records = manifest.datasets if manifest else []
    return next((record for record in records if record.name == Path(prefix).name), None)


def _check_manifest(found: Inspection, manifest: Manifest) -> None:
    record = _record(manifest, found.prefix)
    if record is None:
        found.problems.append(f"the manifest of {found.prefix} does not describe this dataset")
        return
    there = {
        "documents": found.documents,
        "tokens": found.tokens,
        "dtype": found.dtype,
        "bin_bytes": os.path.getsize(bin_path(found.prefix)),
        "idx_bytes": os.path.getsize(idx_path(found.prefix)),
    }
    if found.largest_id is not None:
        there["max_token_id"] = found.largest_id
    found.problems += [
        f"the manifest of {found.prefix} says {name} {getattr(record, name)}, and it is {value}"
        for name, value in there.items()
        if getattr(record, name) != value
    ]
    found.checked.append("manifest: counts and sizes")


def read_documents(prefix: str, numbers: Sequence[int]) -> dict[int, npt.NDArray[Any]]:
    """The token ids of single documents.

    Raises:
        UserError: there is no such document.
    """
    lengths, pointers, marks, dtype = map_index(prefix)
    tokens = np.memmap(bin_path(prefix), mode="r", dtype=dtype)
    found = {}
    for number in numbers:
        if not 0 <= number < len(marks) - 1:
            raise UserError(
                f"{prefix} has no document {number}: it has {len(marks) - 1}, counted from 0"
            )
        first, last = int(marks[number]), int(marks[number + 1])
        start = int(pointers[first]) // dtype.itemsize if last > first else 0
        found[number] = np.array(tokens[start : start + int(lengths[first:last].sum())])
    return found


def together(found: Sequence[Inspection]) -> list[tuple[int, int, int, int]]:
    """The histogram of several datasets."""
    bins: dict[tuple[int, int], tuple[int, int]] = {}
    for inspection in found:
        for start, end, documents, tokens in inspection.histogram:
            before = bins.get((start, end), (0, 0))
            bins[start, end] = (before[0] + documents, before[1] + tokens)
    return [(*ends, *counts) for ends, counts in sorted(bins.items())]


def plot_lengths(histogram: Sequence[tuple[int, int, int, int]], output: Path, title: str) -> None:
    """Writes a PNG of how many documents, and how many tokens, are of which length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(histogram))
    for offset, column, name in ((-0.2, 2, "documents"), (0.2, 3, "tokens")):
        values = np.array([row[column] for row in histogram], float)
        axes.bar(places + offset, 100 * values / max(values.sum(), 1), 0.4, label=f"% of {name}")
    axes.set_xticks(places, [f"{row[0]:,}" for row in histogram], rotation=45)
    axes.set(xlabel="tokens in a document, at least", ylabel="%", title=title)
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
    try:
        with atomic_write(output, "wb") as stream:
            figure.savefig(stream, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"cannot write {output} ({error.strerror})") from error
