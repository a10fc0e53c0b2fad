"""What a run reads, in the configuration's words: prefixes, weights, and who they are.

Everything here is cheap and needs neither torch nor megatron, so that a planner or a check before
the launch can use it.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from samba_megatron.config.data import DataConfig
from samba_megatron.data.indexed import IndexInfo, check_dataset, fingerprint
from samba_megatron.data.tokenizer import load_tokenizer
from samba_megatron.platform.errors import UserError

_PARALLEL_CHECKS = 16
"""Datasets looked at together: with thousands of prefixes the file system's latency adds up."""


@dataclass(frozen=True)
class Blend:
    """Datasets and the share of the samples that each gives."""

    prefixes: list[str]
    weights: list[float] | None
    """None: in proportion to their tokens."""


def parse_blend(paths: Sequence[str], name: str = "data_path") -> Blend:
    """Reads prefixes (``[a, b]``) or alternating weights and prefixes (``[0.3, a, 0.7, b]``).

    Raises:
        UserError: nothing is given, or the weights are not all there and positive.
    """
    items = [str(path).strip() for path in paths]
    if not items:
        raise UserError(f"data.{name} is empty: name at least one dataset prefix")
    numeric = [_number(item) for item in items]
    if all(weight is None for weight in numeric):
        return Blend(items, None)
    weights, prefixes = numeric[::2], items[1::2]
    if (
        len(items) % 2
        or any(weight is None for weight in weights)
        or any(number is not None for number in numeric[1::2])
    ):
        raise UserError(
            f"data.{name} mixes weights and prefixes: give prefixes alone, or a weight before "
            "each prefix"
        )
    given = [weight for weight in weights if weight is not None]
    if min(given) <= 0 or not sum(given) < float("inf"):
        raise UserError(f"data.{name} has the weights {given}: each must be a positive number")
    return Blend(prefixes, given)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def split_fractions(split: str) -> tuple[float, float, float]:
    """Reads Megatron's split (``"98,2,0"``) as fractions for training, validation and test.

    Raises:
        UserError: it is not up to three numbers, not negative, with a positive sum.
    """
    parts = [_number(part) for part in split.split(",")]
    known = [part for part in parts if part is not None and 0 <= part < float("inf")]
    if len(known) != len(parts) or len(parts) > 3 or sum(known) == 0:
        raise UserError(f'data.split is {split!r}: give up to three weights, such as "98,2,0"')
    train, valid, test = [part / sum(known) for part in [*known, 0.0, 0.0][:3]]
    return train, valid, test


def check_datasets(prefixes: Sequence[str], vocab_size: int | None = None) -> list[IndexInfo]:
    """Checks many datasets at once (see :func:`~samba_megatron.data.indexed.check_dataset`)."""
    with ThreadPoolExecutor(_PARALLEL_CHECKS) as pool:
        return list(pool.map(lambda prefix: check_dataset(prefix, vocab_size), prefixes))


def fingerprints(prefixes: Sequence[str]) -> dict[str, str]:
    """A hash of each dataset's content, by prefix."""
    with ThreadPoolExecutor(_PARALLEL_CHECKS) as pool:
        return dict(zip(prefixes, pool.map(fingerprint, prefixes), strict=True))


def dataset_identity(data: DataConfig, random_seed: int) -> dict[str, Any]:
    """What decides the order and content of the samples: saved with every checkpoint.

    Returns:
        A dictionary that JSON can hold; compare two with :func:`identity_differences`. It reads a
        few hundred kB a dataset: take it on one rank.
    """
    tokenizer = load_tokenizer(data.tokenizer) if data.tokenizer else None
    return {
        "train": _blend_identity(data.data_path, "data_path"),
        "valid": _blend_identity(data.valid_data_path, "valid_data_path"),
        "split": None if data.valid_data_path else data.split,
        "sequence_length": data.sequence_length,
        "reset_position_ids": data.reset_position_ids,
        "eod_mask_loss": data.eod_mask_loss,
        "random_seed": random_seed,
        "tokenizer": tokenizer.identity if tokenizer else None,
    }


def _blend_identity(paths: Sequence[str], name: str) -> list[dict[str, Any]]:
    if not paths:
        return []
    blend = parse_blend(paths, name)
    weights: Sequence[float | None] = blend.weights or [None] * len(blend.prefixes)
    hashes = fingerprints(blend.prefixes)
    return [
        {
            "prefix": info.prefix,
            "weight": weight,
            "documents": info.documents,
            "tokens": info.tokens,
            "fingerprint": hashes[info.prefix],
        }
        for info, weight in zip(check_datasets(blend.prefixes), weights, strict=True)
    ]


def identity_differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What differs between two identities, in words; empty when the samples are the same.

    A dataset that has moved is the same dataset: prefixes are named, not compared.
    """
    found = []
    for part in ("train", "valid"):
        before, now = saved.get(part, []), current.get(part, [])
        if len(before) != len(now):
            found.append(f"the {part} blend had {len(before)} datasets, now {len(now)}")
            continue
        for old, new in zip(before, now, strict=True):
            found += [
                f"{key} of the {part} dataset {new['prefix']} was {old.get(key)}, now {new[key]}"
                for key in ("weight", "documents", "tokens", "fingerprint")
                if old.get(key) != new[key]
            ][:1]
    found += [
        f"{key} was {saved.get(key)}, now {value}"
        for key, value in current.items()
        if key not in ("train", "valid") and saved.get(key) != value
    ]
    return found
