"""Files of one JSON object a line that processes append to and may be killed while they do."""

import json
import os
from pathlib import Path
from typing import Any


def ends_in_half_a_line(path: Path) -> bool:
    """Whether a killed process left half a line: the next object must not be glued to it."""
    try:
        with open(path, "rb") as file:
            if not file.seek(0, os.SEEK_END):
                return False
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except FileNotFoundError:
        return False


def parse(line: str | bytes, kind: str) -> dict[str, Any] | None:
    """The object of a line, if it is whole and says of what kind it is in the field ``kind``."""
    try:
        record = json.loads(line)
    except ValueError:  # half a line, which may end within a character
        return None
    return record if isinstance(record, dict) and kind in record else None


def read(path: Path, kind: str) -> list[dict[str, Any]]:
    """All objects of a file in order; half lines are skipped.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with open(path, "rb") as lines:
        return [record for line in lines if (record := parse(line, kind)) is not None]
