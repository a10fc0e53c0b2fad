"""``metrics.jsonl``: one JSON object a line, written before anything else hears of it.

Kinds: ``start`` (layout, kernels, sizes), ``train`` (one a step), ``layers`` (norms, on request),
``stragglers`` (ranks slower than their peers), ``validation`` (one a context length),
``checkpoint`` (one a published save), ``skipped`` (a step not taken), ``rollback`` (to an older
checkpoint), ``end`` (reason and exit code). A resumed run appends; steps that a killed run had done
after its last checkpoint appear again: readers take the last line of a step
(:func:`read_metrics` does).
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from samba_megatron.tracking import json_lines

FILE_NAME = "metrics.jsonl"


class MetricsFile:
    """Appends to a run's metrics file; a line is on its way to the disk when the call returns.

    Args:
        run_dir: the run's folder; made when missing.
        listener: hears of each record once it is written.
    """

    def __init__(
        self, run_dir: Path, listener: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self._listener = listener
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / FILE_NAME
        half = json_lines.ends_in_half_a_line(self.path)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        if half:
            self._file.write("\n")

    def write(self, kind: str, **values: Any) -> dict[str, Any]:
        """Appends one object and returns it; non-finite numbers become null (JSON has none)."""
        record = {"kind": kind, "time": round(time.time(), 3), **values}
        written = _finite(record)
        self._file.write(json.dumps(written) + "\n")
        self._file.flush()
        if self._listener is not None:
            self._listener(written)
        return record

    def close(self) -> None:
        """Forces everything to the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The objects of a metrics file in order, each step (and context length) once: the last.

    A line that a killed run left half-written is skipped.
    """
    last: dict[tuple[Any, ...], dict[str, Any]] = {}
    for number, record in enumerate(json_lines.read(path, "kind")):
        if kind is not None and record["kind"] != kind:
            continue
        key: tuple[Any, ...] = (
            record["kind"],
            record.get("step"),
            record.get("sequence_length"),
        )
        if record["kind"] not in ("train", "validation"):
            key = (*key, number)
        last.pop(key, None)
        last[key] = record
    return list(last.values())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
