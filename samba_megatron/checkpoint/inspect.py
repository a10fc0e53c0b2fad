"""The content of a checkpoint, read without building a model or starting a process group."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from samba_megatron.checkpoint import folder
from samba_megatron.checkpoint.manifest import CorruptCheckpoint, verify

_OPTIMIZER = "optimizer."


def inspect(path: str | Path) -> dict[str, Any]:
    """What a checkpoint is and holds.

    Args:
        path: a checkpoint, or a folder of checkpoints (its latest is taken).

    Returns:
        ``path``; ``manifest`` (a dict); ``problem`` (None, or in what it is corrupt); ``weights``
        and ``optimizer``: {key: {"shape", "dtype", "bytes"}} of the whole tensors; ``objects``:
        names of what is no tensor.

    Raises:
        UserError: if there is no checkpoint, or its manifest cannot be read.
    """
    from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata

    found = folder.find_named(Path(path), check=False)
    weights: dict[str, Any] = {}
    optimizer: dict[str, Any] = {}
    objects: set[str] = set()
    problem = _problem(found.path)
    if problem is None:
        content = FileSystemReader(found.path).read_metadata().state_dict_metadata
        for key, entry in content.items():
            if isinstance(entry, TensorStorageMetadata):
                (optimizer if key.startswith(_OPTIMIZER) else weights)[key] = _describe(entry)
            else:
                objects.add(key.split("/", 1)[0])
    return {
        "path": str(found.path),
        "manifest": asdict(found.manifest),
        "problem": problem,
        "weights": weights,
        "optimizer": optimizer,
        "objects": sorted(objects),
    }


def _problem(path: Path) -> str | None:
    try:
        verify(path)
    except CorruptCheckpoint as reason:
        return str(reason)
    return None


def _describe(entry: Any) -> dict[str, Any]:
    dtype = entry.properties.dtype
    return {
        "shape": list(entry.size),
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": entry.size.numel() * dtype.itemsize,
    }
