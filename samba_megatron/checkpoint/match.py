"""Whether a checkpoint fits a model, found out from its index before anything is read.

megatron would say it with an exception from deep inside, on the rank that notices first.
"""

from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess

from samba_megatron.checkpoint.manifest import Manifest
from samba_megatron.platform.errors import UserError

_NAMED = 3
"""So many differences are named, the rest counted."""


def drop_absent_extra_state(template: dict[str, Any], path: Path) -> tuple[dict[str, Any], int]:
    """Takes out what Transformer Engine's modules keep beside their weights (FP8 scales and the
    like) where the checkpoint has none of it: it was written without Transformer Engine.

    Every rank calls it.

    Args:
        template: the sharded state dict to be loaded; not changed.
        path: the checkpoint.

    Returns:
        The template that can be loaded, and how many objects of other modules than norms were taken
        out on this rank.

    Raises:
        UserError: on every rank, if the checkpoint lacks anything else that is asked for, or holds
            it in another shape.
    """
    saved = load_sharded_metadata(str(path))
    flat, _, _ = load_preprocess(template)
    absent: list[str] = []
    reshaped: list[str] = []
    dropped: set[str] = set()
    for value in nested_values(flat):
        if isinstance(value, ShardedObject):
            if value.unique_key not in saved:
                extra = value.key.endswith("_extra_state")
                (dropped.add if extra else absent.append)(value.unique_key)
        elif isinstance(value, ShardedTensor):
            if value.key not in saved:
                absent.append(value.key)
            elif tuple(saved[value.key].global_shape) != tuple(value.global_shape):
                there, here = saved[value.key].global_shape, value.global_shape
                reshaped.append(f"{value.key} is {list(there)} there, {list(here)} here")
    _raise_together(path, absent, reshaped)
    _, kept = extract_matching_values(
        template, lambda value: isinstance(value, ShardedObject) and value.unique_key in dropped
    )
    # A norm of Transformer Engine has such an object, and nothing in it.
    return kept, sum(not key.rpartition("/")[0].endswith("norm._extra_state") for key in dropped)


def check_parameters(path: Path, manifest: Manifest, parameters: int) -> None:
    """The other direction: the checkpoint must not hold more than this model asks for.

    Raises:
        UserError: if the models' parameter counts differ.
    """
    if manifest.parameters != parameters:
        raise UserError(
            f"checkpoint {path} holds another model: it has {manifest.parameters:,} parameters, "
            f"this model {parameters:,}; {_remedy()}"
        )


def model_differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Sentences about the fields of ``config.model`` that differ, for a refusal's explanation."""
    old, new = there.get("model") or {}, here.get("model") or {}
    return [
        f"model.{name} is {old[name]!r} there, {new[name]!r} here"
        for name in old
        if name in new and old[name] != new[name]
    ]


def _raise_together(path: Path, absent: list[str], reshaped: list[str]) -> None:
    """If any rank found a difference, raises the same sentence on every rank."""
    mine = (sorted(set(absent))[:_NAMED], sorted(set(reshaped))[:_NAMED])
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    all_absent = sorted({name for names, _ in everyone for name in names})
    all_reshaped = sorted({text for _, texts in everyone for text in texts})
    if all_reshaped:
        raise UserError(
            f"checkpoint {path} holds another model: {_some(all_reshaped)}; {_remedy()}"
        )
    weights = [name for name in all_absent if not name.startswith("optimizer.")]
    if all_absent and not weights:
        raise UserError(
            f"checkpoint {path} has no optimizer state: set checkpoint.load_weights_only to take "
            "its weights and begin anew"
        )
    if weights:
        raise UserError(
            f"checkpoint {path} holds another model: it lacks {_some(weights)}; {_remedy()}"
        )


def _remedy() -> str:
    return "use the configuration that it was saved with (in its manifest.json)"


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return "; ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
