"""What a published checkpoint says of itself (``manifest.json``), and whether that is still true.

The manifest is the last file written into a checkpoint before its folder gets its final name: a
folder without one was never finished. Standard library only, so that tools read it at once.
"""

import hashlib
import json
import os
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from samba_megatron.platform.errors import UserError
from samba_megatron.platform.files import write_text

FILE_NAME = "manifest.json"
FORMAT = 1
METADATA = ".metadata"
"""torch's index of all tensors and objects in the checkpoint."""


class CorruptCheckpoint(Exception):
    """A checkpoint is not what was published; the message says in what, as in "… is corrupt: …"."""


@dataclass
class Slice:
    """A part of a file, and the hash of its bytes."""

    file: str
    offset: int
    length: int
    sha256: str


@dataclass
class Manifest:
    """Identity, origin and contents of one checkpoint."""

    step: int
    consumed_samples: int
    consumed_tokens: int
    parameters: int
    """Trainable numbers of the whole model."""
    layout: dict[str, int | None]
    """Parallel sizes of the run that wrote it; it loads at any other."""
    versions: dict[str, str]
    config: dict[str, Any]
    config_sha256: str
    data_identity: dict[str, Any]
    created: str
    """Local time with offset, ISO 8601."""
    metadata_sha256: str
    common_state: Slice | None
    """Where everything that is no tensor lies (step, schedule, parameter groups, configuration)."""
    data_consumed: dict[str, Any] = field(default_factory=dict)
    """The ledger of samples by source."""
    rerun_pending: bool = False
    """Saved by the rerun state machine in the middle of a suspicious step, to be repeated."""
    files: dict[str, int] = field(default_factory=dict)
    """Size in bytes of every other file."""
    checksums: dict[str, str] = field(default_factory=dict)
    """CRC-32 of the files that hold tensors, as their writers read them back."""
    format: int = FORMAT

    @property
    def bytes(self) -> int:
        """Size of the checkpoint on disk, without the manifest."""
        return sum(self.files.values())


def config_hash(config: dict[str, Any]) -> str:
    """SHA-256 of the configuration's canonical JSON."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path, offset: int = 0, length: int | None = None) -> str:
    """SHA-256 of a file, or of ``length`` bytes from ``offset``."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        remaining = path.stat().st_size - offset if length is None else length
        while remaining > 0 and (block := file.read(min(remaining, 1 << 20))):
            digest.update(block)
            remaining -= len(block)
    return digest.hexdigest()


def file_checksum(path: Path) -> str:
    """CRC-32 of a file, eight hexadecimal digits: quick enough for terabytes."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return f"{checksum:08x}"


def damage(path: Path, manifest: Manifest, names: list[str]) -> str | None:
    """What is wrong with the contents of some files of the checkpoint ``path``, if anything."""
    for name in names:
        try:
            found = file_checksum(path / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != manifest.checksums[name]:
            return f"the contents of {name} have changed since they were written"
    return None


def file_sizes(path: Path) -> dict[str, int]:
    """Sizes in bytes of a checkpoint's files, but for the manifest and marks that it is read."""
    return {
        entry.name: entry.stat().st_size
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name)
        if entry.is_file() and entry.name != FILE_NAME and not entry.name.startswith(".reading-")
    }


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes it into the checkpoint folder ``path``; it is on disk when this returns."""
    write_text(path / FILE_NAME, json.dumps(asdict(manifest), indent=1) + "\n")


def read_manifest(path: Path) -> Manifest:
    """The manifest in the checkpoint folder ``path``, believed as it stands.

    Raises:
        CorruptCheckpoint: if there is none or it is not readable.
        UserError: if a newer version of Samba-Megatron wrote it.
    """
    try:
        content = json.loads((path / FILE_NAME).read_text())
    except FileNotFoundError:
        raise CorruptCheckpoint(f"it has no {FILE_NAME}") from None
    except (ValueError, OSError) as error:
        raise CorruptCheckpoint(f"its {FILE_NAME} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise CorruptCheckpoint(f"its {FILE_NAME} is not an object")
    if content.get("format", FORMAT) > FORMAT:
        raise UserError(
            f"checkpoint {path} has format {content['format']}, this version reads up to {FORMAT}: "
            "update Samba-Megatron"
        )
    try:
        known = {item.name for item in fields(Manifest)}
        manifest = Manifest(**{name: value for name, value in content.items() if name in known})
        if manifest.common_state is not None:
            manifest.common_state = Slice(**content["common_state"])
    except TypeError as error:
        raise CorruptCheckpoint(f"its {FILE_NAME} lacks something ({error})") from None
    return manifest


def verify(path: Path) -> Manifest:
    """Checks that every file is there with its size, and the hashes of the index and the common
    state; tensors themselves are not read.

    Returns:
        The manifest.

    Raises:
        CorruptCheckpoint: naming the first thing that differs.
    """
    manifest = read_manifest(path)
    for name, size in manifest.files.items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            raise CorruptCheckpoint(f"{name} is missing") from None
        if found != size:
            raise CorruptCheckpoint(f"{name} has {found:,} bytes, {size:,} were written")
    if file_hash(path / METADATA) != manifest.metadata_sha256:
        raise CorruptCheckpoint(f"{METADATA} has changed since it was written")
    part = manifest.common_state
    if part and file_hash(path / part.file, part.offset, part.length) != part.sha256:
        raise CorruptCheckpoint(f"the common state in {part.file} has changed since it was written")
    return manifest
