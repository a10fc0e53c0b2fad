"""From a Hugging Face folder (ours, or flash-linear-attention's) to a checkpoint with weights only.

The tensors are assembled while the checkpoint is written, one at a time.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, save

import samba_megatron
from samba_megatron.checkpoint import folder, manifest
from samba_megatron.checkpoint.huggingface.fields import from_fields
from samba_megatron.checkpoint.huggingface.folders import finished_at_end, require_new
from samba_megatron.checkpoint.huggingface.shards import ShardReader
from samba_megatron.checkpoint.huggingface.tensors import TensorLink, tensor_links
from samba_megatron.config import RunConfig
from samba_megatron.config.load import to_dict
from samba_megatron.platform import files
from samba_megatron.platform.errors import UserError
from samba_megatron.platform.progress import Progress, byte_progress

_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class ImportReport:
    """What an import has made."""

    path: Path
    """The checkpoint, for ``checkpoint.load``."""
    config: RunConfig
    """Its configuration: only ``model`` is known."""
    parameters: int
    seconds: float


def import_model(source: Path, output: Path, notice: Callable[[str], None]) -> ImportReport:
    """Writes ``output``, a folder of one checkpoint at step 0.

    Args:
        source: folder with ``config.json`` and safetensors.
        output: folder to make: absent or empty.
        notice: gets sentences for people.

    Raises:
        UserError: nothing was written, because of what the message says.
    """
    require_new(output.absolute())
    config = RunConfig(model=from_fields(_read_config(source)))
    reader = ShardReader(source)
    links = tensor_links(config.model)
    _require_all(source, reader, links)
    if config.model.share_embeddings_and_output_weights and "lm_head.weight" in reader.names:
        notice("the head is the embedding (tie_word_embeddings): lm_head.weight was not read")
    if (source / "tokenizer.json").is_file():
        config.data.tokenizer = str(source.absolute())
    with finished_at_end(output) as unfinished:
        writing = folder.begin(unfinished, 0)
        seconds = _write_tensors(writing, reader, links)
        parameters = sum(_elements(reader.shape(name)) for link in links for name in link.parts)
        _write_manifest(writing, config, parameters)
        folder.publish(writing)
    path = output / folder.checkpoint_name(0)
    return ImportReport(path, config, parameters, seconds)


def _read_config(source: Path) -> dict[str, Any]:
    try:
        content = json.loads((source / "config.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{source} is not a Hugging Face model: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{source / 'config.json'} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{source / 'config.json'} is not an object")
    return content


def _require_all(source: Path, reader: ShardReader, links: list[TensorLink]) -> None:
    names = [name for link in links for name in link.parts]
    absent = [name for name in names if name not in reader.names]
    more = sorted(reader.names - set(names) - {"lm_head.weight"})
    if absent or more:
        what = f"lacks {absent[0]}" if absent else f"has {more[0]}, which config.json excludes"
        raise UserError(f"{source} is not the model that its config.json describes: it {what}")
    for link in links:
        for name, rows in link.parts.items():
            if reader.dtype(name) not in _DTYPES:
                raise UserError(f"{name} in {source} is {reader.dtype(name)}: only floats are read")
            if rows is not None and reader.shape(name)[0] != rows * link.groups:
                raise UserError(
                    f"{name} in {source} has {reader.shape(name)[0]} rows and config.json means "
                    f"{rows * link.groups}"
                )


def _elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _whole_shape(link: TensorLink, reader: ShardReader) -> tuple[int, ...]:
    shapes = [reader.shape(name) for name in link.parts]
    if len(shapes) == 1:
        return shapes[0]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _dtype(link: TensorLink, reader: ShardReader) -> torch.dtype:
    if link.kept_in_fp32:
        return torch.float32
    return _DTYPES[reader.dtype(next(iter(link.parts)))]


class _AssembleWhenWritten(DefaultSavePlanner):
    """Makes each tensor at the moment it is written; the state dict holds empty ones."""

    def __init__(self, links: list[TensorLink], reader: ShardReader, progress: Progress):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._links = {link.key: link for link in links}
        self._reader, self._progress = reader, progress

    def lookup_object(self, index: Any) -> Any:
        link = self._links.get(index.fqn)
        if link is None:
            return super().lookup_object(index)
        parts = {name: self._reader.read(name) for name in link.parts}
        tensor = link.join(parts).to(_dtype(link, self._reader)).contiguous()
        self._progress.add(tensor.nbytes)
        return tensor


def _write_tensors(writing: Path, reader: ShardReader, links: list[TensorLink]) -> float:
    content: dict[str, Any] = {
        link.key: torch.empty(_whole_shape(link, reader), dtype=_dtype(link, reader), device="meta")
        for link in links
    }
    progress = byte_progress("writing", sum(tensor.nbytes for tensor in content.values()))
    # What megatron expects beside the tensors: everything that is no tensor, in a list.
    content["common_state/shard_0_1"] = [{"progress": {}}]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")
        save(
            content,
            # A file a tensor: torch holds on to all tensors of a file until it is written.
            storage_writer=FileSystemWriter(writing, single_file_per_rank=False),
            planner=_AssembleWhenWritten(links, reader, progress),
            no_dist=True,
        )
    files.write_text(writing / "metadata.json", json.dumps(_FORMAT))
    return progress.close()


def _write_manifest(writing: Path, config: RunConfig, parameters: int) -> None:
    resolved = to_dict(config)
    layout: dict[str, int | None] = dict.fromkeys(
        ("world_size", "tensor", "pipeline", "context", "data"), 1
    )
    versions = {"samba-megatron": samba_megatron.__version__, "torch": metadata.version("torch")}
    manifest.write_manifest(
        writing,
        manifest.Manifest(
            step=0,
            consumed_samples=0,
            consumed_tokens=0,
            parameters=parameters,
            layout=layout | {"virtual_pipeline": None},
            versions=versions,
            config=resolved,
            config_sha256=manifest.config_hash(resolved),
            data_identity={},
            created=datetime.now().astimezone().isoformat(timespec="seconds"),
            metadata_sha256=manifest.file_hash(writing / manifest.METADATA),
            common_state=None,
            files=manifest.file_sizes(writing),
        ),
    )
