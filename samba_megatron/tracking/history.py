"""A run's whole history, read from its folder: columns of numbers by step, and what happened.

Made for files of a million steps: a line becomes numbers in arrays, nothing else of it is kept. A
run that is still going, one that was resumed and one whose last line is torn all read alike: of a
step that was done twice the last counts, and steps that a resume went back behind are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from samba_megatron.platform.errors import UserError
from samba_megatron.tracking import json_lines, ledger
from samba_megatron.tracking.metrics import FILE_NAME

Floats = NDArray[np.float64]

_KEPT_WHOLE = ("start", "end", "skipped", "rollback", "stragglers")
"""Kinds of which there are few records, and of which everything is of interest."""
_BLOCK_ROWS = 4096
_Shape = tuple[Any, ...]
"""The names of a record and of the records in it."""


class Columns:
    """Numbers by name, one row a record; a name that a record lacks is NaN there."""

    def __init__(self) -> None:
        self._shapes: dict[_Shape, _Block] = {}
        self._rows = 0

    def add(self, record: dict[str, Any]) -> None:
        """Appends a record's numbers, nested ones by dotted name; null is NaN."""
        shape = tuple(
            [(name, *value) if type(value) is dict else name for name, value in record.items()]
        )
        block = self._shapes.get(shape)
        if block is None:
            block = self._shapes[shape] = _Block(record)
        block.add(self._rows, record)
        self._rows += 1

    def _table(self) -> "dict[str, Floats]":
        blocks = [block.whole() for block in self._shapes.values()]
        names = dict.fromkeys(name for names, _, _ in blocks for name in names)
        table = {name: np.full(self._rows, np.nan) for name in names}
        for names_here, rows, values in blocks:
            for column, name in enumerate(names_here):
                table[name][rows] = values[:, column]
        return table

    def settled(self, went_back: list[tuple[int, int]]) -> "dict[str, Floats]":
        """Arrays by name, by ascending step, each step once.

        Args:
            went_back: (rows before it, step) of each start: earlier rows of later steps are of a
                past that was left.
        """
        table = self._table()
        if "step" not in table:
            return {}
        steps = table["step"]
        kept = np.isfinite(steps)
        for rows, step in went_back:
            kept[:rows] &= steps[:rows] <= step
        # The last of equal steps: the first in reversed order.
        rows_kept = np.flatnonzero(kept)[::-1]
        _, last = np.unique(steps[rows_kept], return_index=True)
        order = rows_kept[last]
        return {name: column[order] for name, column in table.items()}

    def __len__(self) -> int:
        return self._rows


class _Block:
    """Rows of records that have the same names: as numbers in arrays, a few thousand at a time."""

    def __init__(self, example: dict[str, Any]) -> None:
        self._plain = [name for name, value in example.items() if _is_number(value, name)]
        self._nested = [
            (name, inner)
            for name, value in example.items()
            if isinstance(value, dict)
            for inner, number in value.items()
            if _is_number(number)
        ]
        self._numbers: list[int] = []
        self._values: list[list[Any]] = []
        self._done: list[tuple[NDArray[np.int64], Floats]] = []

    def add(self, row: int, record: dict[str, Any]) -> None:
        self._numbers.append(row)
        self._values.append(
            [record[name] for name in self._plain]
            + [record[name][inner] for name, inner in self._nested]
        )
        if len(self._values) == _BLOCK_ROWS:
            self._flush()

    def _flush(self) -> None:
        try:
            values = np.array(self._values, dtype=np.float64)  # None becomes NaN
        except (TypeError, ValueError):  # a text among numbers
            values = np.array([[_number(item) for item in row] for row in self._values])
        self._done.append((np.array(self._numbers), values))
        self._numbers, self._values = [], []

    def whole(self) -> tuple[list[str], NDArray[np.int64], Floats]:
        """Names of the columns, numbers of the rows, values."""
        if self._values:
            self._flush()
        names = [*self._plain, *(f"{name}.{inner}" for name, inner in self._nested)]
        rows, values = zip(*self._done, strict=True)
        return names, np.concatenate(rows), np.concatenate(values)


def _is_number(value: Any, name: str = "") -> bool:
    if name in ("kind", "sequence_length"):
        return False
    return value is None or isinstance(value, int | float)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")


@dataclass
class History:
    """What a run's folder tells."""

    folder: Path
    name: str
    train: dict[str, Floats]
    """By column: ``step``, ``time``, ``loss``, ``seconds.data``, …"""
    validation: dict[int, dict[str, Floats]]
    """The same by context length."""
    checkpoints: dict[str, Floats]
    consumed: dict[str, dict[str, float]]
    """The newest ledger of samples, tokens and epochs by source."""
    records: list[dict[str, Any]]
    """Starts, ends, skipped steps, rollbacks, stragglers in order, as written."""
    ledger: list[dict[str, Any]]
    """``run.jsonl``."""
    redone_steps: int
    """Steps whose work was lost: done again after a restart, or left behind."""
    notes: list[str] = field(default_factory=list)

    @property
    def start(self) -> dict[str, Any]:
        """The newest start record; {} where there is none."""
        starts = [record for record in self.records if record["kind"] == "start"]
        return starts[-1] if starts else {}

    @property
    def end(self) -> dict[str, Any] | None:
        """The end record, if the newest life of the run has one."""
        lives = [record for record in self.records if record["kind"] in ("start", "end")]
        return lives[-1] if lives and lives[-1]["kind"] == "end" else None

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration of the newest start."""
        config: dict[str, Any] = self.start.get("config", {})
        return config


class _Reader:
    """Sorts a file's records."""

    def __init__(self) -> None:
        self.train, self.checkpoints = Columns(), Columns()
        self.validation: dict[int, Columns] = {}
        self.records: list[dict[str, Any]] = []
        self.consumed: dict[str, dict[str, float]] = {}
        self.went_back: list[tuple[int, int]] = []

    def take(self, record: dict[str, Any]) -> None:
        """One record, in the file's order."""
        kind = record["kind"]
        if kind == "train":
            self.train.add(record)
        elif kind == "validation":
            length = int(record.get("sequence_length") or 0)
            self.validation.setdefault(length, Columns()).add(record)
        elif kind == "checkpoint":
            self.checkpoints.add(record)
        elif kind == "data":
            self.consumed = record.get("consumed_by_source") or {}
        elif kind in _KEPT_WHOLE:
            if kind == "start" and record.get("step") is not None:
                self.went_back.append((len(self.train), int(record["step"])))
            self.records.append(record)


def read_history(folder: Path) -> History:
    """Reads a run.

    Raises:
        UserError: the folder is no run's.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the folder of a run that has begun")
    reader = _Reader()
    for record in _records(path):
        reader.take(record)
    train = reader.train.settled(reader.went_back)
    validation = {
        length: columns.settled([]) for length, columns in sorted(reader.validation.items())
    }
    return History(
        folder=folder,
        name=_name(folder, reader.records),
        train=train,
        validation=validation,
        checkpoints=reader.checkpoints.settled([]),
        consumed=reader.consumed,
        records=reader.records,
        ledger=ledger.read(folder),
        redone_steps=len(reader.train) - len(train.get("step", ())),
    )


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The file's whole lines; a torn one is skipped."""
    with open(path, "rb") as lines:
        for line in lines:
            try:
                record = orjson.loads(line)
            except ValueError:
                record = json_lines.parse(line, "kind")  # it knows NaN, too
            if isinstance(record, dict) and "kind" in record:
                yield record


def _name(folder: Path, records: list[dict[str, Any]]) -> str:
    """The folder's name, or its parent's where that says more (``421m/run``)."""
    resolved = folder.resolve()
    return f"{resolved.parent.name}/{resolved.name}" if resolved.name == "run" else resolved.name
