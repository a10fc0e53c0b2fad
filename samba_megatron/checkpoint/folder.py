"""The folder of a run's checkpoints: names, the ``latest`` pointer, publishing, retention.

A checkpoint is written under a name that nobody reads (``step_0000100.1f2e3d4c.writing``), gets
its manifest last and then, by one rename, its own name. ``latest`` is replaced after that. Deleting
starts with a rename to ``….deleting``. So a kill at any moment leaves nothing that looks like a
checkpoint and is none. The random part keeps a writer that outlives its run away from the next
run's files. Standard library only.
"""

import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from samba_megatron.checkpoint.manifest import (
    FILE_NAME,
    METADATA,
    CorruptCheckpoint,
    Manifest,
    read_manifest,
    verify,
)
from samba_megatron.platform.errors import UserError
from samba_megatron.platform.files import sync, temporary_name, write_text

LATEST = "latest"
_NAME = re.compile(r"step_(\d{7,})")
_UNFINISHED = re.compile(r"step_\d{7,}\.[0-9a-f]{8}\.(writing|deleting)")
_FOREIGN_READER_SECONDS = 24 * 3600.0
_NONE: Mapping[Path, str] = {}


@dataclass
class Found:
    """A checkpoint to start from, and what people must be told about how it was found."""

    path: Path
    manifest: Manifest
    notices: list[str] = field(default_factory=list)
    corrupt: list[str] = field(default_factory=list)
    """Of the notices those on newer checkpoints that are damaged."""


class NoGoodCheckpoint(UserError):
    """A folder holds checkpoints, and every one is damaged."""


def checkpoint_name(step: int) -> str:
    """``step_0000100`` for step 100."""
    return f"step_{step:07d}"


def checkpoint_step(name: str) -> int | None:
    """The step that a checkpoint's name says; None for any other name."""
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything that has a checkpoint's name, by step; not verified."""
    if not folder.is_dir():
        return []
    found = [(checkpoint_step(entry.name), Path(entry.path)) for entry in os.scandir(folder)]
    return sorted((step, path) for step, path in found if step is not None and path.is_dir())


def read_latest(folder: Path) -> str | None:
    """The name in ``latest``; None if there is no such file or no such name in it."""
    try:
        name = (folder / LATEST).read_text().strip()
    except (OSError, ValueError):
        return None
    return name if checkpoint_step(name) is not None else None


def begin(folder: Path, step: int) -> Path:
    """Makes and returns the folder to write the checkpoint of ``step`` into."""
    folder.mkdir(parents=True, exist_ok=True)
    path = _unfinished(folder / checkpoint_name(step), "writing")
    path.mkdir()
    return path


def publish(writing: Path) -> tuple[Path, Path | None]:
    """Gives a finished checkpoint its name and points ``latest`` at it.

    Args:
        writing: what :func:`begin` returned, with every file on disk and the manifest among them.

    Returns:
        The checkpoint's path, and a folder to :func:`remove` where one of the same step had to
        make way (left by a run that went back to an earlier step).
    """
    if not (writing / FILE_NAME).is_file():
        raise RuntimeError(f"{writing} has no {FILE_NAME}: it is not finished")
    target = writing.with_name(writing.name.split(".", 1)[0])
    sync(writing)
    replaced = _set_aside(target) if target.exists() else None
    writing.rename(target)
    sync(target.parent)
    write_text(target.parent / LATEST, target.name + "\n")
    return target, replaced


def retire(folder: Path, keep_last: int, milestone_interval: int | None) -> list[Path]:
    """Sets aside the checkpoints that are no longer kept, for :func:`remove`.

    Kept are the newest ``keep_last`` up to the one that ``latest`` names (0: all), milestones,
    those newer than ``latest`` (not this run's to judge) and any that is being read.
    """
    latest = read_latest(folder)
    if latest is None or keep_last <= 0:
        return []
    last = checkpoint_step(latest) or 0
    candidates = [
        (step, path)
        for step, path in list_checkpoints(folder)
        if step <= last and (path / FILE_NAME).is_file()
    ]
    retired = []
    for step, path in candidates[:-keep_last]:
        milestone = bool(milestone_interval) and step % (milestone_interval or 1) == 0
        if not milestone and path.name != latest and not is_being_read(path):
            retired.append(_set_aside(path))
    return retired


def remove(*paths: Path) -> None:
    """Deletes folders that were set aside or never finished."""
    for path in paths:
        if not _UNFINISHED.fullmatch(path.name):
            raise ValueError(f"{path} is not set aside")
        shutil.rmtree(path, ignore_errors=True)


def clean(folder: Path) -> list[Path]:
    """Deletes what a killed run left half-written or half-deleted; returns what that was."""
    if not folder.is_dir():
        return []
    left = [Path(entry.path) for entry in os.scandir(folder) if _UNFINISHED.fullmatch(entry.name)]
    remove(*left)
    temporary_name(folder / LATEST).unlink(missing_ok=True)
    return left


def require_space(folder: Path, needed: int) -> None:
    """Makes sure that ``needed`` bytes can be written into ``folder``, which is made if need be.

    Raises:
        UserError: naming the bytes needed and free, or why the folder cannot be written.
    """
    probe = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(
            f"checkpoints cannot be written to {folder} ({error.strerror}): choose another "
            "checkpoint.save or mend its permissions"
        ) from None
    if free < needed:
        raise UserError(
            f"a checkpoint needs {needed / 1e9:.2f} GB but {folder} has {free / 1e9:.2f} GB free: "
            "make room, lower checkpoint.keep_last, or choose another checkpoint.save"
        )


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Keeps retention, in any process, from deleting the checkpoint ``path`` meanwhile."""
    mark = path / f".reading-{socket.gethostname()}-{os.getpid()}"
    # A checkpoint that this user may not write to is not this user's to delete either.
    with suppress(OSError):
        mark.touch()
    try:
        yield
    finally:
        with suppress(OSError):
            mark.unlink()


def is_being_read(path: Path) -> bool:
    """Whether a living process of this machine, or lately one of another, marked it as read."""
    for mark in path.glob(".reading-*"):
        host, _, pid = mark.name.removeprefix(".reading-").rpartition("-")
        if host == socket.gethostname() and pid.isdigit():
            if Path(f"/proc/{pid}").exists():
                return True
            continue
        with suppress(OSError):
            if time.time() - mark.stat().st_mtime < _FOREIGN_READER_SECONDS:
                return True
    return False


def find_latest(
    folder: Path, check: bool = True, damaged: Mapping[Path, str] = _NONE
) -> Found | None:
    """The checkpoint that ``latest`` names or, where that is damaged, the newest good one before.

    Args:
        folder: a run's checkpoints.
        check: verify sizes and hashes; without, any readable manifest is believed.
        damaged: checkpoints whose contents are known to be damaged, and how.

    Returns:
        None if the folder holds no checkpoint.

    Raises:
        NoGoodCheckpoint: if it holds checkpoints and none is good.
    """
    candidates = list_checkpoints(folder)
    latest, notices, corrupt = read_latest(folder), [], []
    if latest is None:
        if not candidates:
            return None
        notices.append(f"{folder / LATEST} is missing or names no checkpoint: taking the newest")
    else:
        last = checkpoint_step(latest) or 0
        candidates = [(step, path) for step, path in candidates if step <= last]
        if not any(path.name == latest for _, path in candidates):
            notices.append(f"{folder / LATEST} names {latest}, which is not there")
    for _, path in reversed(candidates):
        try:
            manifest = _verified(path, check, damaged)
        except CorruptCheckpoint as reason:
            corrupt.append(f"checkpoint {path} is corrupt: {reason}")
            notices.append(f"{corrupt[-1]}; trying the one before it")
            continue
        if notices:
            notices.append(f"going on from {path}")
        return Found(path, manifest, notices, corrupt)
    raise NoGoodCheckpoint(
        "; ".join([*notices, f"{folder} holds no good checkpoint"])
        + ": restore one, or choose another checkpoint.save to start anew"
    )


def _verified(path: Path, check: bool, damaged: Mapping[Path, str]) -> Manifest:
    if path in damaged:
        raise CorruptCheckpoint(damaged[path])
    return verify(path) if check else read_manifest(path)


def find_before(
    folder: Path, last_step: int, check: bool = True, damaged: Mapping[Path, str] = _NONE
) -> Found | None:
    """The newest good checkpoint of ``last_step`` or before; None if there is none."""
    for step, path in reversed(list_checkpoints(folder)):
        if step > last_step:
            continue
        try:
            return Found(path, _verified(path, check, damaged))
        except CorruptCheckpoint:
            continue
    return None


def find_named(path: Path, check: bool = True, damaged: Mapping[Path, str] = _NONE) -> Found:
    """The checkpoint ``path``, or the latest one in the folder of checkpoints ``path``.

    Raises:
        UserError: if there is none, or it is corrupt, unfinished or not this program's.
    """
    if not path.is_dir():
        raise UserError(f"there is no checkpoint {path}: check checkpoint.load")
    if _UNFINISHED.fullmatch(path.name):
        raise UserError(f"{path} was never finished: load a folder without .writing or .deleting")
    is_checkpoint = (path / FILE_NAME).is_file() or checkpoint_step(path.name) is not None
    if not is_checkpoint:
        if (path / METADATA).exists():
            raise UserError(
                f"{path} is a sharded checkpoint, but not one that Samba-Megatron published: it "
                f"has no {FILE_NAME}"
            )
        found = find_latest(path, check, damaged)
        if found is None:
            raise UserError(
                f"{path} holds no checkpoint of Samba-Megatron (step_…/{FILE_NAME}): check "
                "checkpoint.load"
            )
        return found
    try:
        return Found(path, _verified(path, check, damaged))
    except CorruptCheckpoint as reason:
        raise UserError(f"checkpoint {path} is corrupt: {reason}; load another one") from None


def _unfinished(path: Path, state: str) -> Path:
    return path.with_name(f"{path.name}.{os.urandom(4).hex()}.{state}")


def _set_aside(path: Path) -> Path:
    aside = _unfinished(path, "deleting")
    path.rename(aside)
    sync(path.parent)
    return aside
