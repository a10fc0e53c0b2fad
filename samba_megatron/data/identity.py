"""Who the data of a run are: kept in each checkpoint, compared when a run goes on from it.

Where a dataset lies does not matter, what is in it does. The blend may change between a checkpoint
and the run that goes on (every source keeps its own position); the content of a source may not,
because the position would mean nothing any more.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from samba_megatron.config.data import DataConfig
from samba_megatron.data.blend import Blend, training_blend, validation_blend
from samba_megatron.data.catalogue import Catalogue
from samba_megatron.data.datasets import cache_folder, known_sources
from samba_megatron.data.indexed import fingerprint
from samba_megatron.data.loss_masks import has_mask, mask_prefix
from samba_megatron.data.tokenizer import load_tokenizer

_MOST_NAMED = 5


def dataset_identity(data: DataConfig, random_seed: int) -> dict[str, Any]:
    """What decides the order and content of the samples: saved with every checkpoint.

    Returns:
        A dictionary that JSON can hold; compare two with :func:`identity_differences` and
        :func:`blend_changes`. Take it on one rank.

    Raises:
        UserError: a dataset or the blend is missing or wrong.
    """
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    catalogue = Catalogue(cache_folder(data))
    train = training_blend(data)
    valid = validation_blend(data.valid_data_path) if data.valid_data_path else None
    identity = {
        "train": _described(train, catalogue, data.loss_masks),
        "stages": [
            {"until_tokens": s.until_tokens, "weights": s.weights and dict(s.weights)}
            for s in train.stages
        ],
        "valid": _described(valid, catalogue, data.loss_masks) if valid else [],
        "split": None if data.valid_data_path else data.split,
        "sequence_length": data.sequence_length,
        "eod_mask_loss": data.eod_mask_loss,
        "random_seed": random_seed,
        "tokenizer": tokenizer.identity if tokenizer else None,
    }
    catalogue.save()
    return identity


def _mask_of(prefix: str) -> str:
    """What tells a dataset's loss mask from others; nothing where there is none."""
    return "+" + fingerprint(mask_prefix(prefix)) if has_mask(prefix) else ""


def _described(blend: Blend, catalogue: Catalogue, masks: bool) -> list[dict[str, Any]]:
    """The sources; where masks are used, another mask is other data."""
    return [
        {
            "name": source.name,
            "prefix": source.prefix,
            "weight": source.weight,
            "max_epochs": source.max_epochs,
            "documents": facts.documents,
            "tokens": facts.tokens,
            "fingerprint": facts.fingerprint + (_mask_of(source.prefix) if masks else ""),
        }
        for source, facts in zip(blend.sources, known_sources(blend, catalogue), strict=True)
    ]


def identity_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What a run cannot go on with, in words; empty when every source's position holds."""
    before, now = _by_content(saved), _by_content(current)
    left = {_name(entry): entry for key, entry in before.items() if key not in now}
    found = []
    for key, entry in now.items():
        old = left.get(_name(entry)) if key not in before else None
        if old is not None:
            found.append(_changed_content(old, entry))
    if before and not before.keys() & now.keys() and not found:
        found.append(f"none of its datasets is in the blend: {_list([*left])}")
    mixture = ("train", "valid", "stages")
    return found + [
        f"{key} was {saved.get(key)}, now {value}"
        for key, value in current.items()
        if key not in mixture and saved.get(key) != value
    ]


def blend_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """How the blend and the held-out data differ, in words: each takes effect from here on."""
    before, now = _by_content(saved), _by_content(current)
    joined = [_name(entry) for key, entry in now.items() if key not in before]
    gone = [_name(entry) for key, entry in before.items() if key not in now]
    old, new = _shares(before), _shares(now)
    moved = [
        f"{_name(now[key])} from {old[key]:.4g} to {new[key]:.4g}"
        for key in now
        if key in before and abs(old[key] - new[key]) > 1e-9
    ]
    capped = [
        f"{_name(now[key])} from {before[key].get('max_epochs')} to {now[key]['max_epochs']}"
        for key in now
        if key in before and before[key].get("max_epochs") != now[key]["max_epochs"]
    ]
    found = {
        "these sources have joined the blend": joined,
        "these sources have left the blend": gone,
        "shares of the blend have changed": moved,
        "max_epochs has changed": capped,
    }
    notices = [f"{what}: {_list(names)}" for what, names in found.items() if names]
    if saved.get("stages", []) != current["stages"]:
        notices.append("the stages of the blend have changed")
    held_out = [[e["fingerprint"] for e in side.get("valid", [])] for side in (saved, current)]
    if held_out[0] != held_out[1]:
        notices.append("the held-out data have changed")
    return notices


def _by_content(identity: Mapping[str, Any]) -> dict[str, Any]:
    return {entry["fingerprint"]: entry for entry in identity.get("train", [])}


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry.get("name") or entry["prefix"])


def _changed_content(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    for key in ("documents", "tokens", "fingerprint"):
        if old[key] != new[key]:
            return f"{key} of the dataset {_name(new)} was {old[key]}, now {new[key]}"
    raise AssertionError("datasets of equal fingerprint do not differ")


def _shares(entries: Mapping[str, Any]) -> dict[str, float]:
    by_tokens = any(entry["weight"] is None for entry in entries.values())
    weights = {
        key: float(entry["tokens"] if by_tokens else entry["weight"])
        for key, entry in entries.items()
    }
    whole = sum(weights.values()) or 1.0
    return {key: weight / whole for key, weight in weights.items()}


def _list(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
