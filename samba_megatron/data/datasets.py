"""Training and validation samples from indexed datasets: blends, splits and their cached order.

What megatron.core does (indices, blending, the samples themselves) is done by megatron.core; this
file says what it is asked for, and finds the user's mistakes on one rank before the others wait.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from samba_megatron.config.data import DataConfig
from samba_megatron.data.blend import (
    Blend,
    check_datasets,
    fingerprints,
    parse_blend,
    split_fractions,
)
from samba_megatron.data.indexed import IndexInfo, sequence_lengths
from samba_megatron.data.stream import SampleDataset
from samba_megatron.data.tokenizer import Tokenizer, load_tokenizer
from samba_megatron.platform.errors import UserError

if TYPE_CHECKING:
    from samba_megatron.data.epochs import SampleConfig


@dataclass(frozen=True)
class _NoTokenizer:
    """Stands in where no setting depends on a tokenizer."""

    eod: int = -1
    vocab_size: int | None = None

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        return {"eod": None}


@dataclass(frozen=True)
class _Sources:
    """What rank 0 has found out about the datasets, the same on all ranks."""

    train: Blend
    valid: Blend | None
    """None: a part of ``train``, or no validation."""
    fingerprints: dict[str, str]


def build_train_and_valid(
    data: DataConfig,
    train_samples: int,
    valid_samples: int,
    random_seed: int,
    vocab_size: int | None = None,
) -> tuple[SampleDataset, SampleDataset | None]:
    """Builds the samples of a run, wrapping around the data as often as is needed.

    Collective: with torch.distributed initialised every rank calls it, rank 0 builds the indices
    and the others map them from ``data.path_to_cache``. Without it, it just builds.

    Args:
        data: which datasets. Without ``path_to_cache`` the indices are kept in a folder
            ``index_cache`` beside the first dataset.
        train_samples: training samples to have at least.
        valid_samples: validation samples to have at least; 0 for none.
        random_seed: decides the order of documents and samples.
        vocab_size: the model's; a dataset with ids outside it is refused.

    Returns:
        Training and validation datasets (the second None if not asked for). Sample ``i`` is a dict
        of ``tokens``, ``labels``, ``position_ids`` ``[s]`` int64 and ``loss_mask`` ``[s]`` float32,
        and depends on the data, the seed and ``i`` alone.

    Raises:
        UserError: on every rank, if a dataset is missing, damaged or too small, or settings
            contradict each other.
    """
    sources = on_first_rank(lambda: _inspect(data, valid_samples, vocab_size))
    from samba_megatron.data.epochs import EpochsDataset, SampleBuilder

    config = _megatron_config(data, sources, random_seed, valid_samples > 0)
    sizes = [train_samples, valid_samples, 0]
    train, valid, _ = SampleBuilder(EpochsDataset, sizes, lambda: True, config).build()
    return train, valid


def on_first_rank[T](work: Callable[[], T]) -> T:
    """Does ``work`` on rank 0 and gives its result to all; a UserError is raised on all."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return work()
    outcome: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            outcome = [(work(), None)]
        except UserError as error:
            outcome = [(None, str(error))]
    distributed.broadcast_object_list(outcome, src=0)
    result, message = outcome[0]
    if message is not None:
        raise UserError(message)
    return result


def _inspect(data: DataConfig, valid_samples: int, vocab_size: int | None) -> _Sources:
    """Checks all datasets and settles the weights of the blends."""
    train_part, valid_part = (1.0, 0.0) if data.valid_data_path else _parts(data, valid_samples)
    given = parse_blend(data.data_path)
    infos = check_datasets(given.prefixes, vocab_size)
    for info in infos:
        _check_long_enough(info, 0.0, train_part, data.sequence_length, "training")
        if valid_part:
            until = train_part + valid_part
            _check_long_enough(info, train_part, until, data.sequence_length, "validation")
    train = _weighted(given, infos)
    valid = None
    if data.valid_data_path and valid_samples:
        given = parse_blend(data.valid_data_path, "valid_data_path")
        infos = check_datasets(given.prefixes, vocab_size)
        for info in infos:
            _check_long_enough(info, 0.0, 1.0, data.sequence_length, "validation")
        valid = _weighted(given, infos)
    prefixes = {*train.prefixes, *(valid.prefixes if valid else [])}
    return _Sources(train, valid, fingerprints(sorted(prefixes)))


def _parts(data: DataConfig, valid_samples: int) -> tuple[float, float]:
    """The fractions of each dataset for training and validation; the second 0 if not needed."""
    train, valid, _ = split_fractions(data.split)
    if valid_samples and not valid:
        raise UserError(
            f'data.split is "{data.split}", which leaves nothing for validation: give it a second '
            "part, or set data.valid_data_path"
        )
    if not train:
        raise UserError(f'data.split is "{data.split}", which leaves nothing for training')
    return train, valid if valid_samples else 0.0


def _check_long_enough(
    info: IndexInfo, start: float, end: float, sequence_length: int, use: str
) -> None:
    """Refuses a dataset whose part for ``use`` is shorter than one sample."""
    first, last = round(start * info.sequences), round(end * info.sequences)
    tokens = info.tokens
    if (first, last) != (0, info.sequences):
        tokens = int(sequence_lengths(info.prefix)[first:last].sum(dtype=np.int64))
    if tokens < sequence_length + 1:
        raise UserError(
            f"the dataset {info.prefix} has {tokens} tokens for {use}, fewer than one sample of "
            f"sequence_length {sequence_length} + 1: use a larger dataset, another split or "
            "shorter sequences"
        )


def _weighted(blend: Blend, infos: list[IndexInfo]) -> Blend:
    """The blend with weights: Megatron wraps around the data only of blends that have them."""
    if blend.weights is not None or len(infos) == 1:
        return Blend(blend.prefixes, blend.weights if len(infos) > 1 else None)
    return Blend(blend.prefixes, [float(info.tokens) for info in infos])


def _megatron_config(
    data: DataConfig, sources: _Sources, random_seed: int, with_valid: bool
) -> "SampleConfig":
    from samba_megatron.data.epochs import SampleConfig

    train = (sources.train.prefixes, sources.train.weights)
    valid = (sources.valid.prefixes, sources.valid.weights) if sources.valid else None
    from_split = not data.valid_data_path
    config = SampleConfig(
        random_seed=random_seed,
        sequence_length=data.sequence_length,
        blend=train if from_split else None,
        blend_per_split=None if from_split else [train, valid, None],
        split=data.split if from_split else None,
        path_to_cache=data.path_to_cache or str(_default_cache(sources.train)),
        tokenizer=_tokenizer(data),
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=False,
        fingerprints=sources.fingerprints,
    )
    if config.split_matrix is not None:
        # Megatron would build the parts that are not used as well, and fail if they are empty.
        unused = [2] if with_valid else [1, 2]
        config.split_matrix = [
            None if part in unused else ends for part, ends in enumerate(config.split_matrix)
        ]
    return config


def _default_cache(blend: Blend) -> Path:
    return Path(blend.prefixes[0]).absolute().parent / "index_cache"


def _tokenizer(data: DataConfig) -> Tokenizer | _NoTokenizer:
    if data.tokenizer:
        return load_tokenizer(data.tokenizer)
    needing = [name for name in ("reset_position_ids", "eod_mask_loss") if getattr(data, name)]
    if needing:
        raise UserError(
            f"data.{needing[0]} needs to know the end-of-document token: set data.tokenizer"
        )
    return _NoTokenizer()
