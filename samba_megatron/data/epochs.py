"""Training samples in an order that does not depend on how long the run will be.

Megatron's ``GPTDataset`` shuffles all the epochs of a run together, so asking for more samples
re-orders those already seen: a run that is made longer would repeat and lose data. Here every
epoch is a ``GPTDataset`` of its own with a seed of its own, and a run reads one after another. The
first epoch is exactly Megatron's, and a longer run begins with the shorter one.

The index files are published whole (Megatron writes them in place, where a killed job leaves them
half-written for the next one) under a name that covers the data's content (Megatron's covers the
path only, and serves stale indices for a dataset that was made again).
"""

import copy
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset


@dataclass
class SampleConfig(GPTDatasetConfig):
    """Megatron's dataset configuration, and the content of the datasets."""

    fingerprints: dict[str, str] = field(default_factory=dict)
    """A hash of each dataset's content, by prefix."""


class EpochDataset(GPTDataset):
    """One shuffled pass over a dataset's documents, cut into samples."""

    def _build_document_sample_shuffle_indices(self) -> tuple[Any, Any, Any]:
        self.unique_identifiers["fingerprint"] = self.config.fingerprints[self.dataset_path]
        self.unique_description = json.dumps(
            self.unique_identifiers, indent=4, default=lambda value: value.unique_identifiers
        )
        self.unique_description_hash = hashlib.md5(
            self.unique_description.encode(), usedforsecurity=False
        ).hexdigest()
        return _load_or_publish(self, super()._build_document_sample_shuffle_indices)


class EpochsDataset(MegatronDataset):
    """As many epochs of one dataset as the run needs, one after another."""

    def __init__(
        self,
        dataset: Any,
        dataset_path: str,
        indices: Any,
        num_samples: int | None,
        index_split: Any,
        config: SampleConfig,
    ) -> None:
        """Takes what Megatron's builder passes to a ``GPTDataset``.

        Args:
            dataset: the ``IndexedDataset``.
            dataset_path: its prefix.
            indices: the sequences to use.
            num_samples: samples to have at least; None makes one epoch.
            index_split: training, validation or test.
            config: the seed in it is the first epoch's; the next ones count up from it.
        """
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)

        def epoch(number: int) -> EpochDataset:
            seeded = copy.copy(config)
            seeded.random_seed = config.random_seed + number
            return EpochDataset(dataset, dataset_path, indices, None, index_split, seeded)

        first = epoch(0)
        self.samples_per_epoch = len(first)
        count = max(1, math.ceil((num_samples or 1) / self.samples_per_epoch))
        self.epochs = [first, *(epoch(number) for number in range(1, count))]

    def __len__(self) -> int:
        return len(self.epochs) * self.samples_per_epoch

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        epoch, sample = divmod(int(idx), self.samples_per_epoch)
        return self.epochs[epoch][sample]

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: Any) -> int:
        """Sequences of the ``IndexedDataset``."""
        return GPTDataset.numel_low_level_dataset(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: SampleConfig) -> Any:
        """The ``IndexedDataset`` at a prefix."""
        return GPTDataset.build_low_level_dataset(dataset_path, config)


class PublishedBlend(BlendedDataset):
    """Megatron's blend of several datasets, its index published whole."""

    def _build_indices(self) -> tuple[Any, Any]:
        return _load_or_publish(self, super()._build_indices)


class SampleBuilder(BlendedMegatronDatasetBuilder):
    """Megatron's builder (rank 0 builds, the others load), with the classes of this file."""

    @staticmethod
    def build_generic_dataset(cls: Any, *arguments: Any) -> Any:
        """Builds a dataset on rank 0 first, then on the other ranks."""
        kind = PublishedBlend if cls is BlendedDataset else cls
        return BlendedMegatronDatasetBuilder.build_generic_dataset(kind, *arguments)


def _load_or_publish[T](dataset: Any, build: Callable[[], T]) -> T:
    """Loads a dataset's index from its folder in the cache, which rank 0 first makes if need be.

    ``build`` is Megatron's method: it writes to ``dataset.config.path_to_cache`` what it does not
    find there. Two jobs that make the same folder at once are no harm: the contents are equal, and
    one of them wins.
    """
    root = Path(dataset.config.path_to_cache)
    published = root / dataset.unique_description_hash
    if not published.exists() and _is_first_rank():
        temporary = root / f".{published.name}.{uuid.uuid4().hex}.partial"
        try:
            with _caching_in(dataset, temporary):
                build()
            _publish_folder(temporary, published)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    with _caching_in(dataset, published):
        return build()


@contextmanager
def _caching_in(dataset: Any, folder: Path) -> Iterator[None]:
    """Lets Megatron's code see ``folder`` as the cache; the configuration itself is shared."""
    shared = dataset.config
    dataset.config = copy.copy(shared)
    dataset.config.path_to_cache = str(folder)
    try:
        yield
    finally:
        dataset.config = shared


def _publish_folder(temporary: Path, target: Path) -> None:
    for path in [*temporary.iterdir(), temporary]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    try:
        os.rename(temporary, target)
    except OSError:
        if not target.exists():  # else another job has just published the same
            raise


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
