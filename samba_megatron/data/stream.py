"""Samples to micro-batches for one data-parallel rank, read ahead in the background.

The samples of a run have one global order. A step takes the next ``global_batch_size`` of them,
whatever the number of ranks and the micro-batch size; within a step, micro-batch ``m`` of rank
``r`` takes ``micro_batch_size`` samples from ``(m * data_parallel_size + r) * micro_batch_size``
on. So the only state is how many samples are behind us. Where several ranks share a sequence they
take the same samples, and each a piece of them.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from samba_megatron.platform.errors import UserError

Batch = dict[str, Tensor | None]
"""``tokens``, ``labels``, ``position_ids`` ``[b, s]`` int64, ``loss_mask`` ``[b, s]`` float32,
``attention_mask`` None (the kernels mask). Where documents stay apart, also ``document_start``
``[b, s]`` bool, True at the first token of a document, or of what the sample has of it. A stage of
a pipeline that reads no tokens has that only.

Of a sequence that several ranks share, a rank's batch has its own piece; but ``document_start`` is
that of the whole sequence."""

_BY_TOKEN = ("tokens", "labels", "loss_mask", "position_ids")
_FIELDS = (*_BY_TOKEN, "document_start")


class Piece(NamedTuple):
    """What of each sequence a rank has: one of so many equal pieces, in their order."""

    number: int = 0
    of: int = 1

    def cut(self, batch: "Batch") -> "Batch":
        """This piece of a whole batch; copies, so that the rest need not be kept.

        Raises:
            UserError: the sequence does not make equal pieces.
        """
        if self.of == 1:
            return batch
        cut = dict(batch)
        for name in _BY_TOKEN:
            tensor = batch.get(name)
            if tensor is None:
                continue
            length, rest = divmod(tensor.shape[1], self.of)
            if rest:
                raise UserError(f"a sequence of {tensor.shape[1]} makes no {self.of} equal pieces")
            cut[name] = tensor[:, self.number * length : (self.number + 1) * length].clone()
        return cut


WHOLE = Piece()
"""Where no sequence is shared."""


class SampleDataset(Protocol):
    """Numbered samples, each with some of a batch's fields, [s]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Tensor]: ...


class HasBoundaries(Protocol):
    """Samples that can say where documents begin without being read."""

    def __len__(self) -> int: ...

    def boundaries(self, index: int, /) -> Mapping[str, Tensor]:
        """``document_start`` [s] of a sample."""
        ...


class BoundariesOnly:
    """Of each sample only where documents begin: what a stage between the first and the last reads.

    Args:
        dataset: the samples.
    """

    def __init__(self, dataset: HasBoundaries) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        return self._dataset.boundaries(index)


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
        piece: Piece = WHOLE,
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
            piece: what of each sequence this rank has.
        """
        self._dataset = dataset
        self._micro_batch_size = micro_batch_size
        self._rank = data_parallel_rank
        self._stride = micro_batch_size * data_parallel_size
        self._consumed = consumed_samples
        self._read_ahead = read_ahead
        self._pin_memory = pin_memory
        self._piece = piece
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
        batch = self._piece.cut(collate(samples))
        if not self._pin_memory:
            return batch
        return {
            name: None if value is None else value.pin_memory() for name, value in batch.items()
        }


def collate(samples: Sequence[Mapping[str, Tensor]]) -> Batch:
    """Stacks samples ``[s]`` into a micro-batch ``[b, s]`` of what they have."""
    fields = [name for name in _FIELDS if name in samples[0]]
    batch: Batch = {name: torch.stack([sample[name] for sample in samples]) for name in fields}
    batch["attention_mask"] = None
    return batch


def evaluation_batches(
    dataset: SampleDataset,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    piece: Piece = WHOLE,
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
        yield piece.cut(batch)
