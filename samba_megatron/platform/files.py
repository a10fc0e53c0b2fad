"""Publishing files so that a reader sees a whole file or none.

Everything is written beside its target under a temporary name, flushed to the disk and renamed:
a killed process leaves a ``.partial`` file, never a short one that looks finished.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def temporary_name(target: Path) -> Path:
    """The name under which ``target`` is written until it is complete."""
    return target.with_name(f".{target.name}.partial")


def publish(temporary: Path, target: Path) -> None:
    """Makes the finished file ``temporary`` appear as ``target``, replacing what was there."""
    sync(temporary)
    os.replace(temporary, target)
    sync(target.parent)


@contextmanager
def atomic_write(target: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a temporary file for writing; publishes it as ``target`` if the block succeeds."""
    temporary = temporary_name(target)
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(temporary, mode, encoding=encoding) as stream:
            yield stream
        publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Replaces ``target`` by a file with ``text``; it is on disk when this returns."""
    with atomic_write(target) as stream:
        stream.write(text)


def sync(path: Path) -> None:
    """Puts on disk a file's bytes or, of a folder, the names created, renamed or removed in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
