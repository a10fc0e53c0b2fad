"""What a dataset was made from: the manifest beside it, and whether it still holds.

``P.manifest.json`` is written last. When the same command is run again, an equal description of
inputs, tokenizer and options means that there is nothing to do; a different one is refused, so
that a dataset is not replaced by accident.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from samba_megatron.data.indexed import bin_path, check_dataset, idx_path
from samba_megatron.data.jsonl import hash_file
from samba_megatron.data.publish import atomic_write
from samba_megatron.platform.errors import UserError

_FORMAT = 1


@dataclass
class InputFile:
    """One input as it was read."""

    path: str
    """Absolute."""
    size: int
    """Bytes on disk, compressed or not."""
    mtime_ns: int
    """Time of last modification: with the size, a quick sign that the file is the same."""
    sha256: str


@dataclass
class Manifest:
    """Everything that decides a dataset's bytes, and what came out."""

    inputs: list[InputFile]
    tokenizer: dict[str, Any]
    """``identity``, ``eod`` and ``vocab_size``."""
    options: dict[str, Any]
    """The options that the output depends on."""
    counts: dict[str, Any]
    """Documents, tokens, bytes and lines, and the lines skipped by reason."""
    output: dict[str, Any]
    """``dtype``, ``bin_bytes``, ``idx_bytes`` and the largest token id."""
    made_by: dict[str, Any] = field(default_factory=dict)
    """Versions, engine, time: for a person, never compared."""
    format: int = _FORMAT


def manifest_path(prefix: str | Path) -> Path:
    """The manifest of the dataset at ``prefix``."""
    return Path(f"{prefix}.manifest.json")


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Writes the manifest of a dataset that is complete."""
    with atomic_write(manifest_path(prefix)) as stream:
        json.dump(asdict(manifest), stream, indent=2)
        stream.write("\n")


def read_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest of a dataset, or None if there is none.

    Raises:
        UserError: the file is not a manifest.
    """
    path = manifest_path(prefix)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["inputs"] = [InputFile(**entry) for entry in content["inputs"]]
        return Manifest(**content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a manifest ({error}): remove it or overwrite") from error


def is_up_to_date(
    prefix: str | Path,
    inputs: list[Path],
    tokenizer: dict[str, Any],
    options: dict[str, Any],
    overwrite: bool,
) -> bool:
    """Whether the dataset at ``prefix`` is what these inputs, tokenizer and options would make.

    False means: go ahead and write it. A dataset whose description is equal but whose files are
    missing or damaged is written again.

    Raises:
        UserError: the dataset is another one and ``overwrite`` is not set; the message names what
            differs.
    """
    manifest = read_manifest(prefix) if not overwrite else _readable_manifest(prefix)
    if manifest is None:
        existing = [path for path in (bin_path(prefix), idx_path(prefix)) if path.exists()]
        if existing and not overwrite:
            raise UserError(
                f"{existing[0]} exists without a manifest: choose another --output-prefix or give "
                "--overwrite to replace it"
            )
        return False
    changed = _differences(manifest, inputs, tokenizer, options)
    if not changed:
        return _is_intact(prefix, manifest)
    if overwrite:
        return False
    raise UserError(
        f"the dataset {prefix} was made differently ({'; '.join(changed)}): choose another "
        "--output-prefix or give --overwrite to replace it"
    )


def _readable_manifest(prefix: str | Path) -> Manifest | None:
    try:
        return read_manifest(prefix)
    except UserError:
        return None


def _differences(
    manifest: Manifest, inputs: list[Path], tokenizer: dict[str, Any], options: dict[str, Any]
) -> list[str]:
    """What differs from the manifest, in words."""
    changed = [
        f"{name} was {manifest.options.get(name)!r}, now {value!r}"
        for name, value in options.items()
        if manifest.options.get(name) != value
    ]
    if manifest.tokenizer != tokenizer:
        changed.append("the tokenizer is another one")
    if len(manifest.inputs) != len(inputs):
        changed.append(f"there were {len(manifest.inputs)} inputs, now {len(inputs)}")
        return changed
    for recorded, path in zip(manifest.inputs, inputs, strict=True):
        if not _is_same_file(recorded, path):
            changed.append(f"the input {path} has changed")
    return changed


def _is_same_file(recorded: InputFile, path: Path) -> bool:
    """Whether a file's content is the recorded one; reads it only if its time has changed."""
    status = path.stat()
    if status.st_size != recorded.size:
        return False
    if str(path.absolute()) == recorded.path and status.st_mtime_ns == recorded.mtime_ns:
        return True
    return hash_file(path) == recorded.sha256


def _is_intact(prefix: str | Path, manifest: Manifest) -> bool:
    """Whether the dataset's files are there and as long as they were written."""
    try:
        check_dataset(prefix)
    except UserError:
        return False
    return (
        os.path.getsize(bin_path(prefix)) == manifest.output["bin_bytes"]
        and os.path.getsize(idx_path(prefix)) == manifest.output["idx_bytes"]
    )
