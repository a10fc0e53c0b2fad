"""Keeps count of what a shard's inputs held, and decides when too much of it was unusable."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from samba_megatron.data.jsonl import Defect
from samba_megatron.data.manifest import InputRecord
from samba_megatron.data.preprocessing.options import Counts, PreprocessOptions
from samba_megatron.data.preprocessing.readers import Batch, PieceReader, place_name
from samba_megatron.data.preprocessing.shards import Piece, Shard
from samba_megatron.platform.errors import UserError

EXAMPLES = 10
"""Unusable places that are named; the others are counted."""

_REMEDIES = {
    Defect.MALFORMED: "mend the line",
    Defect.NOT_OBJECT: "each line must be a JSON object with the text under a key",
    Defect.MISSING_KEY: "name the key that holds the text with --text-key",
    Defect.NOT_STRING: "name the key that holds the text with --text-key",
    Defect.NOT_UNICODE: "mend the line",
    Defect.EMPTY: "remove the line",
}


class ShardReading:
    """A shard's batches, one after another, with an account of all that was read."""

    def __init__(
        self, options: PreprocessOptions, shard: Shard, with_metadata: bool = False
    ) -> None:
        self.counts = Counts()
        self.examples: list[str] = []
        self.inputs: list[InputRecord] = []
        self._options = options
        self._shard = shard
        self._with_metadata = with_metadata
        self._raw_before = 0
        self._reader: PieceReader | None = None

    @property
    def raw_bytes(self) -> int:
        """Bytes of the input files behind us."""
        return self._raw_before + (self._reader.raw_bytes if self._reader else 0)

    def __iter__(self) -> Iterator[tuple[Batch, Callable[[int], str]]]:
        """Yields each batch and the function that names the place of one of its texts.

        Raises:
            UserError: an input is damaged, or holds more unusable places than are allowed.
        """
        for piece in self._shard.pieces:
            reader = PieceReader(piece, self._options.text_key, self._with_metadata)
            self._reader = reader
            for batch in reader:
                self._take(batch, _namer(piece, reader.lines))
                yield batch, _namer(piece, reader.lines, batch.places)
            self._raw_before += piece.raw_bytes
            self._reader = None
            self.inputs.append(_record(piece, reader))

    def _take(self, batch: Batch, name: Callable[[int], str]) -> None:
        counts = self.counts
        counts.lines += batch.lines
        counts.blank_lines += batch.blank_lines
        counts.read_bytes += batch.read_bytes
        for issue in batch.issues:
            self.skip(issue.defect, lambda line=issue.line: name(line))  # type: ignore[misc]

    def skip(self, defect: Defect, place: Callable[[], str]) -> None:
        """Counts an unusable place; raises UserError if it is one too many."""
        self.counts.skipped[defect] += 1
        strict = self._options.on_error == "fail"
        if strict and self.counts.skipped.total() > self._options.max_errors:
            seen = f" (after {', '.join(self.examples)})" if self.examples else ""
            raise UserError(
                f"{place()}: {defect}: {_REMEDIES[defect]}, or pass over such places with "
                f"--on-error skip{seen}"
            )
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{place()}: {defect}")

    def record(self) -> dict[str, Any]:
        """The account, for the workspace."""
        return {
            "counts": self.counts.as_dict(),
            "examples": self.examples,
            "inputs": [asdict(entry) for entry in self.inputs],
        }


def _namer(piece: Piece, before: int, places: list[int] | None = None) -> Callable[[int], str]:
    """Names a line of a batch, or the line of its n-th text."""

    def name(index: int) -> str:
        return place_name(piece, before + (index if places is None else places[index]))

    return name


def _record(piece: Piece, reader: PieceReader) -> InputRecord:
    file = piece.file
    return InputRecord(
        file.path, file.size, file.stamp, piece.start, piece.end, reader.lines, reader.sha256
    )


def counts_of(record: dict[str, Any]) -> Counts:
    """The counts in a shard's account."""
    entries = record["counts"]
    return Counts(**(entries | {"skipped": Counter(entries["skipped"])}))
