"""The folder in which an unfinished run keeps what it planned and what it has done.

``P.preprocess/`` lies beside the output. It holds the plan (inputs, options, shards), a record of
each finished shard, datatrove's completion marks and logs, and how far the shards in flight are.
A run that finds one goes on with it, if its plan is the same. At the end it is removed.
"""

import contextlib
import fcntl
import json
import os
import shutil
import struct
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from samba_megatron.platform.errors import UserError
from samba_megatron.platform.files import atomic_write

_PROGRESS = struct.Struct("<4Q")
_WAIT_FOR_THE_DYING_S = 2.0
"""Workers of a command that was killed end a moment after it."""


class Workspace:
    """The folder, by the output's prefix."""

    def __init__(self, prefix: str) -> None:
        self.folder = Path(f"{prefix}.preprocess")

    @property
    def plan_path(self) -> Path:
        """What is being done."""
        return self.folder / "plan.json"

    def read_plan(self) -> dict[str, Any] | None:
        """The plan of an unfinished run."""
        try:
            return json.loads(self.plan_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot read {self.plan_path} ({error}): give --overwrite to start again"
            ) from error

    def begin(self, plan: dict[str, Any]) -> None:
        """Writes the plan of a new run."""
        try:
            for name in ("shards", "progress", "completions"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            with atomic_write(self.plan_path) as stream:
                json.dump(plan, stream, indent=1)
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror}") from error

    def claim(self) -> None:
        """Makes the folder this process's until it ends; what an earlier one left stays in it.

        Raises:
            UserError: another process works for this output, or the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror}") from error
        until = time.monotonic() + _WAIT_FOR_THE_DYING_S
        while not _lock(descriptor):
            if time.monotonic() > until:
                os.close(descriptor)
                raise UserError(
                    f"another process works for this output (it holds {self.folder}): wait for it "
                    "or stop it"
                )
            time.sleep(0.1)
        _claims.append(descriptor)

    def clear(self) -> None:
        """Forgets what an earlier run has left, but keeps the folder, which may be claimed."""
        self.plan_path.unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Forgets the run."""
        with contextlib.suppress(NotADirectoryError):
            self.plan_path.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        release_claims()

    def write_record(self, shard: int, record: dict[str, Any]) -> None:
        """Notes that a shard's datasets are complete, and what is in them."""
        with atomic_write(self._record_path(shard)) as stream:
            json.dump(record, stream)

    def read_record(self, shard: int) -> dict[str, Any] | None:
        """What a finished shard holds; None while it is unfinished."""
        try:
            return json.loads(self._record_path(shard).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _record_path(self, shard: int) -> Path:
        return self.folder / "shards" / f"{shard:05d}.json"

    def forget(self, shard: int) -> None:
        """Has a shard done again."""
        self._record_path(shard).unlink(missing_ok=True)
        (self.folder / "completions" / f"{shard:05d}").unlink(missing_ok=True)

    def note_progress(self, shard: int, raw: int, read: int, documents: int, tokens: int) -> None:
        """Tells whoever watches how far a shard is; a torn or lost note does no harm."""
        path = self.folder / "progress" / f"{shard:05d}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(descriptor, _PROGRESS.pack(raw, read, documents, tokens), 0)
        finally:
            os.close(descriptor)

    def progress(self, shards: Iterable[int]) -> dict[int, tuple[int, int, int, int]]:
        """Raw bytes, read bytes, documents and tokens of each shard that has been begun."""
        found = {}
        for shard in shards:
            try:
                content = (self.folder / "progress" / f"{shard:05d}").read_bytes()
            except OSError:
                continue
            if len(content) == _PROGRESS.size:
                found[shard] = _PROGRESS.unpack(content)
        return found


_claims: list[int] = []
"""Open folders that this process has locked."""


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks: two commands at once are then the user's care
    return True


def release_claims() -> None:
    """Gives up what :meth:`Workspace.claim` took; a worker does so for its copy at its start."""
    while _claims:
        os.close(_claims.pop())


def plan_of(
    files: Iterable[Any], tokenizer: dict[str, Any], options: dict[str, Any], engine: str
) -> dict[str, Any]:
    """The description of a run that is compared when it is gone on with."""
    return {
        "inputs": [asdict(file) for file in files],
        "tokenizer": tokenizer,
        "options": options,
        "engine": engine,
    }


def plan_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two plans, in words."""
    changed = [
        f"{name} was {old['options'].get(name)!r}, now {value!r}"
        for name, value in new["options"].items()
        if old["options"].get(name) != value
    ]
    if old["tokenizer"] != new["tokenizer"]:
        changed.append("the tokenizer is another one")
    before = {entry["path"]: entry for entry in old["inputs"]}
    if len(old["inputs"]) != len(new["inputs"]):
        changed.append(f"there were {len(old['inputs'])} inputs, now {len(new['inputs'])}")
    for entry in new["inputs"]:
        if entry["path"] not in before:
            changed.append(f"the input {entry['path']} is new")
        elif entry != before[entry["path"]]:
            changed.append(f"the input {entry['path']} has changed")
    if not changed and [e["path"] for e in old["inputs"]] != [e["path"] for e in new["inputs"]]:
        changed.append("the inputs are in another order")
    return changed
