"""The model under test and its tokenizer, from a checkpoint of any layout or a Hugging Face folder.

A checkpoint's tensors go straight into the model that exports ship with, one at a time: no export
is written, and megatron is not started.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from samba_megatron.platform.errors import UserError

if TYPE_CHECKING:
    from samba_megatron.data.tokenizer import Tokenizer

DType = Literal["auto", "bf16", "fp32"]


@dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    model: Any
    """A causal language model of transformers, in evaluation mode on its device."""
    tokenizer: "Tokenizer | None"
    """None: the folder has none and none was given."""
    identity: dict[str, Any]
    """What tells this model from others; kept with the results."""

    def require_tokenizer(self) -> "Tokenizer":
        """The tokenizer.

        Raises:
            UserError: there is none, or its tokens are not the model's.
        """
        if self.tokenizer is None:
            raise UserError(
                "the model comes without a tokenizer: name the one of its data with --tokenizer"
            )
        vocabulary = self.model.config.vocab_size
        if self.tokenizer.vocab_size > vocabulary:
            raise UserError(
                f"the tokenizer {self.tokenizer.path.parent} has {self.tokenizer.vocab_size} "
                f"tokens and the model's vocabulary {vocabulary}: give the one of its data"
            )
        return self.tokenizer


def is_huggingface(folder: Path) -> bool:
    """Whether a folder is in Hugging Face format rather than a checkpoint."""
    return (folder / "config.json").is_file()


def load_subject(folder: Path, tokenizer: Path | None, device: str, dtype: DType) -> Subject:
    """Loads what is to be evaluated.

    Args:
        folder: a checkpoint, a folder of checkpoints (its latest is taken), or an export.
        tokenizer: the tokenizer's folder, where it is not the one that the model names.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: of the computation; ``auto`` is the one of the weights.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name a checkpoint or an export")
    load = _from_export if is_huggingface(folder) else _from_checkpoint
    model, found, identity = load(folder, tokenizer, dtype)
    return Subject(model.to(device).eval(), found, identity)


def _from_export(folder: Path, given: Path | None, dtype: DType) -> tuple[Any, Any, dict[str, Any]]:
    from safetensors import SafetensorError
    from transformers.utils import logging

    from samba_megatron.checkpoint.huggingface.loading import model_class
    from samba_megatron.data.tokenizer import load_tokenizer

    logging.disable_progress_bar()
    try:
        model, loaded = model_class(folder).from_pretrained(
            folder, dtype=_torch_dtype(dtype) or "auto", output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{folder} cannot be loaded as a Hugging Face folder: {reason}") from error
    if absent := sorted(loaded["missing_keys"]):
        raise UserError(
            f"{folder} is incomplete: its files lack {absent[0]}"
            + (f" and {len(absent) - 1} more tensors" if len(absent) > 1 else "")
            + "; export it again"
        )
    has_one = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    named = given or (folder if has_one else None)
    weights = sorted(folder.glob("*.safetensors"))
    identity = {
        "model": str(folder.resolve()),
        "bytes": sum(file.stat().st_size for file in weights),
    }
    return model, load_tokenizer(named) if named else None, identity


def _from_checkpoint(
    folder: Path, given: Path | None, dtype: DType
) -> tuple[Any, Any, dict[str, Any]]:
    from samba_megatron.checkpoint.huggingface.companions import find_tokenizer
    from samba_megatron.checkpoint.huggingface.source import CheckpointSource

    source = CheckpointSource(folder)
    files = find_tokenizer(source, given)
    model = _empty_model(source, files.ids)
    wanted = _torch_dtype(dtype)
    _fill(model, source, wanted or source.dtype(source.links[0]))
    identity = {
        "model": str(source.path.resolve()),
        "step": source.manifest.step,
        "consumed_tokens": source.manifest.consumed_tokens,
    }
    return model, files.tokenizer, identity


def _empty_model(source: Any, ids: dict[str, int | None]) -> Any:
    """The exports' model in the sizes of a checkpoint, its tensors not yet there."""
    import torch

    from samba_megatron.checkpoint.huggingface.fields import HYBRID, to_fields
    from samba_megatron.checkpoint.huggingface.shipped.configuration_samba import (
        SambaConfig,
        SambaHybridConfig,
    )
    from samba_megatron.checkpoint.huggingface.shipped.modeling_samba import (
        SambaForCausalLM,
        SambaHybridForCausalLM,
    )

    fields = to_fields(source.config.model, source.config.data.sequence_length, ids)
    hybrid = fields["model_type"] == HYBRID
    inert = ("model_type", "architectures", "auto_map")
    sizes = {name: value for name, value in fields.items() if name not in inert}
    config = (SambaHybridConfig if hybrid else SambaConfig)(**sizes)
    with torch.device("meta"):
        return (SambaHybridForCausalLM if hybrid else SambaForCausalLM)(config)


def _fill(model: Any, source: Any, dtype: Any) -> None:
    """Gives the model a checkpoint's tensors, in a dtype but for those that stay in fp32."""
    import torch

    tensors = {}
    for link in source.links:
        kept = torch.float32 if link.kept_in_fp32 else dtype
        for name, part in link.split(source.read(link).to(kept)):
            tensors[name] = part
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    absent = [name for name, value in model.named_parameters() if value.is_meta]
    assert not absent, f"the checkpoint gave no {absent[0]}"


def _torch_dtype(dtype: DType) -> Any:
    import torch

    return {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
