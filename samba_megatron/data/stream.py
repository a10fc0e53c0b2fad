"""Samples to micro-batches for one data-parallel rank, read ahead in the background.

The samples of a run have one global order. A step takes the next ``global_batch_size`` of them,
whatever the number of ranks and the micro-batch size; within a step, micro-batch ``m`` of rank
``r`` takes ``micro_batch_size`` samples from ``(m * data_parallel_size + r) * micro_batch_size``
on. So the only state is how many samples are behind us.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from samba_megatron.platform.errors import UserError

Batch = dict[str, Tensor | None]
"""``tokens``, ``labels``, ``position_ids`` ``[b, s]`` int64, ``loss_mask`` ``[b, s]`` float32,
``attention_mask`` None (the kernels mask)."""

_FIELDS = ("tokens", "labels", "loss_mask", "position_ids")


class SampleDataset(Protocol):
    """Numbered samples, each with ``tokens``, ``labels``, ``loss_mask``, ``position_ids`` [s]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Tensor]: ...


class SampleStream:
    """Serves one data-parallel rank its micro-batches, step by step.

    ``consumed_samples`` is the state to save: a stream that starts with it goes on exactly where
    this one is, at any other number of ranks or micro-batch size.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        consumed_samples: int = 0,
        read_ahead: int = 1,
        pin_memory: bool = False,
    ) -> None:
        """Starts at ``consumed_samples``.

        Args:
            dataset: the samples in their global order.
            micro_batch_size: samples a micro-batch and rank.
            data_parallel_rank: this rank's number.
            data_parallel_size: number of ranks that share the samples.
            consumed_samples: samples taken by all ranks before.
            read_ahead: micro-batches read in the background before they are asked for (by one
                thread, across the borders of steps); 0 reads when asked.
            pin_memory: put batches in page-locked memory, for asynchronous copies to a GPU.
        """
        self._dataset = dataset
        self._micro_batch_size = micro_batch_size
        self._rank = data_parallel_rank
        self._stride = micro_batch_size * data_parallel_size
        self._consumed = consumed_samples
        self._read_ahead = read_ahead
        self._pin_memory = pin_memory
        self._pool = ThreadPoolExecutor(1, "sample-stream") if read_ahead else None
        self._ahead: deque[tuple[int, Future[Batch]]] = deque()

    @property
    def consumed_samples(self) -> int:
        """Samples of all steps handed out so far, over all ranks."""
        return self._consumed

    def next_global_batch(self, global_batch_size: int) -> Iterator[Batch]:
        """The micro-batches of the next step; the step counts as consumed from now on.

        The iterator may be left unused, as on a pipeline stage that reads no data.

        Raises:
            UserError: the batch size is not a multiple of micro-batch size times ranks, or the
                dataset does not have so many samples left.
        """
        if global_batch_size <= 0 or global_batch_size % self._stride:
            raise UserError(
                f"global_batch_size {global_batch_size} is not a multiple of micro_batch_size x "
                f"data-parallel size = {self._stride}"
            )
        start, end = self._consumed, self._consumed + global_batch_size
        if end > len(self._dataset):
            raise UserError(
                f"samples {start}..{end - 1} were asked of a dataset of {len(self._dataset)}: "
                "build it for the length of the run"
            )
        self._consumed = end
        return (self._take(position) for position in range(start, end, self._stride))

    def close(self) -> None:
        """Stops reading ahead."""
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None
        self._ahead.clear()

    def _take(self, position: int) -> Batch:
        """This rank's micro-batch out of the samples from ``position``."""
        while self._ahead and self._ahead[0][0] < position:
            self._ahead.popleft()[1].cancel()
        ready = None
        if self._ahead and self._ahead[0][0] == position:
            ready = self._ahead.popleft()[1]
        if self._pool:
            self._fill(self._pool, position)
        return ready.result() if ready else self._read(position)

    def _fill(self, pool: ThreadPoolExecutor, position: int) -> None:
        """Lets the background read what follows ``position``."""
        following = self._ahead[-1][0] if self._ahead else position
        while len(self._ahead) < self._read_ahead:
            following += self._stride
            if following + self._stride > len(self._dataset):
                return
            self._ahead.append((following, pool.submit(self._read, following)))

    def _read(self, position: int) -> Batch:
        first = position + self._rank * self._micro_batch_size
        samples = [self._dataset[first + offset] for offset in range(self._micro_batch_size)]
        batch = collate(samples)
        if not self._pin_memory:
            return batch
        return {
            name: None if value is None else value.pin_memory() for name, value in batch.items()
        }


def collate(samples: Sequence[Mapping[str, Tensor]]) -> Batch:
    """Stacks samples ``[s]`` into a micro-batch ``[b, s]``."""
    batch: Batch = {name: torch.stack([sample[name] for sample in samples]) for name in _FIELDS}
    batch["attention_mask"] = None
    return batch


def evaluation_batches(
    dataset: SampleDataset, micro_batch_size: int, data_parallel_rank: int, data_parallel_size: int
) -> Iterator[Batch]:
    """Every sample of ``dataset`` once over all ranks, in equally many micro-batches on each.

    Where samples run out, a batch is filled up with copies whose ``loss_mask`` is zero.
    """
    total = len(dataset)
    stride = micro_batch_size * data_parallel_size
    for position in range(0, total, stride):
        first = position + data_parallel_rank * micro_batch_size
        numbers = range(first, first + micro_batch_size)
        batch = collate([dataset[min(number, total - 1)] for number in numbers])
        loss_mask = batch["loss_mask"]
        assert loss_mask is not None
        loss_mask[torch.tensor([number >= total for number in numbers])] = 0.0
        yield batch
