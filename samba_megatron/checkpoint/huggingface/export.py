"""From a checkpoint, in any layout, to a folder that transformers loads."""

import json
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from samba_megatron.checkpoint.huggingface import companions, parity
from samba_megatron.checkpoint.huggingface.fields import beyond_fla, to_fields
from samba_megatron.checkpoint.huggingface.folders import finished_at_end, require_new
from samba_megatron.checkpoint.huggingface.shards import ShardWriter, TensorEntry
from samba_megatron.checkpoint.huggingface.source import CheckpointSource
from samba_megatron.checkpoint.huggingface.tensors import TensorLink
from samba_megatron.platform.errors import ExitWith
from samba_megatron.platform.exits import ExitCode
from samba_megatron.platform.progress import byte_progress

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
REPORT = "parity.json"
"""What an export is known by."""


@dataclass(frozen=True)
class ExportOptions:
    """What to convert, and to what."""

    checkpoint: Path
    """A checkpoint, or a folder of checkpoints (its latest is taken)."""
    output: Path
    """Folder to make: absent or empty, unless ``overwrite``."""
    dtype: Literal["bf16", "fp32"] | None = None
    """Dtype of the weights; as they were trained when unset. A_log, D and the bias of dt_proj are
    in fp32 always."""
    shard_bytes: int = 5_000_000_000
    """Largest file."""
    tokenizer: Path | None = None
    """The tokenizer's folder, where it is not the one that the checkpoint names."""
    overwrite: bool = False
    """Replace an earlier export in ``output``, once the new one has passed."""
    compare: Literal["logits", "tensors"] = "logits"
    """What the parity report compares: tensors alone need no memory for a whole model."""


@dataclass(frozen=True)
class ExportReport:
    """What an export has made."""

    output: Path
    bytes: int
    """Size of all tensors."""
    seconds: float
    """Time to convert them."""
    peak_bytes: int
    """Largest memory of this process while converting."""
    parity: dict[str, Any]
    """The content of ``parity.json``."""


def export(options: ExportOptions, notice: Callable[[str], None]) -> ExportReport:
    """Converts a checkpoint, reloads what it has written, and compares.

    The folder gets its name last: what has failed stays in ``OUTPUT.partial``.

    Args:
        options: what to convert.
        notice: gets sentences for people.

    Raises:
        UserError: nothing was written, because of what the message says.
        ExitWith: the folder does not hold the same model.
    """
    replaces = REPORT if options.overwrite else None
    require_new(options.output.absolute(), replaces)
    source = CheckpointSource(options.checkpoint)
    for text in source.notices:
        notice(text)
    files = companions.find_tokenizer(source, options.tokenizer)
    beyond = beyond_fla(source.config.model)
    if files.tokenizer is None:
        notice("the checkpoint names no tokenizer and --tokenizer gave none: exported without one")
    if beyond:
        notice(
            f"flash-linear-attention's Samba cannot express this model ({', '.join(beyond)}): it "
            "loads with trust_remote_code=True only"
        )
    dtype = DTYPES[options.dtype] if options.dtype else weights_dtype(source)
    with finished_at_end(options.output, replaces) as folder:
        size, seconds = _write_weights(source, folder, dtype, options.shard_bytes)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        name = str(dtype).removeprefix("torch.")
        _write_companions(source, folder, name, files, beyond)
        report = parity.compare(source.path, folder, name, options.compare, notice)
        _write_json(folder / REPORT, report)
        notice(parity.summary(report))
        if not report["passed"]:
            raise ExitWith(
                ExitCode.FAILED,
                f"the export is not the same model as {source.path}: it stays in {folder}, and "
                "parity.json there says what differs",
            )
    return ExportReport(options.output, size, seconds, peak, report)


def weights_dtype(source: CheckpointSource) -> torch.dtype:
    """The dtype that a checkpoint's matrices are saved in."""
    return source.dtype(source.links[0])


def exported_dtype(link: TensorLink, dtype: torch.dtype) -> torch.dtype:
    """The dtype of one tensor in an export of the given dtype."""
    return torch.float32 if link.kept_in_fp32 else dtype


def _write_weights(
    source: CheckpointSource, folder: Path, dtype: torch.dtype, shard_bytes: int
) -> tuple[int, float]:
    """Streams all tensors; their size in bytes and the seconds it took."""
    entries = [
        TensorEntry(name, shape, exported_dtype(link, dtype))
        for link in source.links
        for name, shape in link.shapes(source.shape(link)).items()
    ]
    writer = ShardWriter(folder, entries, shard_bytes)
    progress = byte_progress("converting", writer.total_bytes)
    for link in source.links:
        tensor = source.read(link).to(exported_dtype(link, dtype))
        for name, part in link.split(tensor):
            writer.write(name, part)
            progress.add(part.nbytes)
    writer.close()
    return writer.total_bytes, progress.close()


def _write_companions(
    source: CheckpointSource,
    folder: Path,
    dtype: str,
    files: companions.TokenizerFiles,
    beyond: list[str],
) -> None:
    config = source.config
    fields = to_fields(config.model, config.data.sequence_length, files.ids)
    # transformers 4 reads torch_dtype, 5 dtype; 4.57 both.
    _write_json(folder / "config.json", {**fields, "dtype": dtype, "torch_dtype": dtype})
    _write_json(folder / "generation_config.json", companions.generation_config(files.ids))
    (folder / "README.md").write_text(companions.model_card(source, dtype, beyond))
    files.copy_to(folder)
    companions.copy_code(folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
