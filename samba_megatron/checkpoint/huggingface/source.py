"""The tensors of a sharded checkpoint, whole and one at a time, in any layout it was written in.

Each tensor is assembled from the pieces that the ranks wrote; nothing else of it is read, so the
memory needed is that of one tensor and its largest piece.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata, load

from samba_megatron.checkpoint import folder
from samba_megatron.checkpoint.huggingface.tensors import TensorLink, tensor_links
from samba_megatron.config import RunConfig
from samba_megatron.config.load import from_dict
from samba_megatron.platform.errors import UserError


class _Reader(FileSystemReader):
    """Reads the index once, not once a tensor."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._index = super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        return self._index


class CheckpointSource:
    """A published checkpoint, open for reading."""

    def __init__(self, path: Path) -> None:
        """Finds the checkpoint and makes sure that it is whole and of a model known here.

        Args:
            path: a checkpoint, or a folder of checkpoints (its latest is taken).

        Raises:
            UserError: there is none, a file is missing or changed, or its model is unknown.
        """
        if not path.is_dir():
            raise UserError(f"there is no checkpoint {path}: give a folder that training has saved")
        found = folder.find_named(path)
        self.path, self.manifest = found.path, found.manifest
        self.notices = found.notices
        if "model" not in self.manifest.config:
            raise UserError(f"checkpoint {self.path} does not say what model it holds")
        self.config: RunConfig = from_dict(
            self.manifest.config, f"in the configuration of checkpoint {self.path}"
        )
        self._reader = _Reader(self.path)
        self.links = tensor_links(self.config.model)
        self.entries: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self._reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._require_all()

    def shape(self, link: TensorLink) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self.entries[link.key].size)

    def dtype(self, link: TensorLink) -> torch.dtype:
        """The dtype it is saved in."""
        return self.entries[link.key].properties.dtype

    def read(self, link: TensorLink) -> torch.Tensor:
        """The whole tensor."""
        tensor = torch.empty(self.shape(link), dtype=self.dtype(link))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is")
            load({link.key: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor

    def _require_all(self) -> None:
        absent = [link.key for link in self.links if link.key not in self.entries]
        if absent:
            raise UserError(
                f"checkpoint {self.path} is of an unknown architecture: it lacks {absent[0]}"
                + (f" and {len(absent) - 1} more" if len(absent) > 1 else "")
            )
        known = {link.key for link in self.links}
        more = [k for k in self.entries if k not in known and not k.startswith("optimizer.")]
        if more:
            raise UserError(
                f"checkpoint {self.path} is of an unknown architecture: it has {more[0]}, which "
                "its configuration does not account for"
            )
        for link in self.links:
            try:
                link.shapes(self.shape(link))
            except ValueError as error:
                raise UserError(f"checkpoint {self.path} is inconsistent: {error}") from None
