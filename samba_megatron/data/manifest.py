"""What datasets were made from: the manifest beside them.

``P.manifest.json`` is written last, when all that it describes is there. Beside a corpus of one
dataset it describes that dataset; beside one of many shards (``P_00000``, ``P_00001``, …) it
describes them together, and each shard has a manifest of its own with the same fields.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from samba_megatron.data.indexed import IndexedWriter, bin_path, idx_path
from samba_megatron.platform.errors import UserError
from samba_megatron.platform.files import atomic_write

_FORMAT = 2


@dataclass
class InputRecord:
    """A part of an input file, or all of it, as it was read."""

    path: str
    """Absolute, or a URL."""
    size: int
    """Bytes of the whole file, compressed or not."""
    stamp: str
    """Changes with the file: with the size, a quick sign that it is the same."""
    start: int
    """First byte (of JSON lines) or row group (of parquet) that was read."""
    end: int
    """One after the last; -1: to the end."""
    lines: int
    """Lines, rows or (of plain text) documents in it."""
    sha256: str
    """Of the bytes that were read; of a parquet file, of its texts."""


@dataclass
class DatasetRecord:
    """One ``.bin/.idx`` pair."""

    name: str
    """The last part of its prefix: beside the manifest."""
    split: str
    """``train`` or ``validation``."""
    documents: int
    tokens: int
    dtype: str
    max_token_id: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str

    @classmethod
    def finish(cls, writer: IndexedWriter, prefix: str | Path, split: str) -> Self:
        """Publishes what a writer has written, and describes it."""
        info = writer.finish()
        return cls(
            name=Path(prefix).name,
            split=split,
            documents=info.documents,
            tokens=info.tokens,
            dtype=str(info.dtype),
            max_token_id=writer.max_token_id,
            bin_bytes=bin_path(prefix).stat().st_size,
            idx_bytes=idx_path(prefix).stat().st_size,
            bin_sha256=writer.bin_sha256,
        )


@dataclass
class Manifest:
    """Everything that decides the datasets' bytes, and what came out."""

    inputs: list[InputRecord]
    tokenizer: dict[str, Any]
    """``identity``, ``eod`` and ``vocab_size``."""
    options: dict[str, Any]
    """The options that the output depends on."""
    counts: dict[str, Any]
    """Documents, tokens, bytes and lines, and the places skipped by reason."""
    datasets: list[DatasetRecord]
    """All datasets that this describes, in order."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Of each filter or deduplication, the documents it was given and let through."""
    made_by: dict[str, Any] = field(default_factory=dict)
    """Versions, engine, time: for a person, never compared."""
    format: int = _FORMAT


def manifest_path(prefix: str | Path) -> Path:
    """The manifest of the dataset at ``prefix``."""
    return Path(f"{prefix}.manifest.json")


def write_manifest(prefix: str | Path, manifest: Manifest) -> None:
    """Writes the manifest of what is complete."""
    with atomic_write(manifest_path(prefix)) as stream:
        json.dump(asdict(manifest), stream, indent=2)
        stream.write("\n")


def read_manifest(prefix: str | Path) -> Manifest | None:
    """The manifest of a dataset or of a corpus of shards, or None if there is none.

    Raises:
        UserError: the file is not a manifest, or one of another version.
    """
    path = manifest_path(prefix)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"its format is {content['format']}, not {_FORMAT}")
        content["inputs"] = [InputRecord(**entry) for entry in content["inputs"]]
        content["datasets"] = [DatasetRecord(**entry) for entry in content["datasets"]]
        return Manifest(**content)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not a manifest of this version ({error}): remove it or give --overwrite"
        ) from error
