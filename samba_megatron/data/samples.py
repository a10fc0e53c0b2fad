"""Training samples of a blend: numbered, made when they are asked for.

Datasets are opened at their first sample and at most so many are held open: a run over thousands
of prefixes stays under the limit on open files, and a rank pays only for what it reads.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from samba_megatron.data.blend_order import (
    BlendExhausted,
    BlendOrder,
    Plan,
    Position,
    from_ledger,
    phase_shares,
    to_ledger,
)
from samba_megatron.data.blend_summary import summarise
from samba_megatron.data.indexed import bin_path, map_index
from samba_megatron.data.sample_index import (
    EpochOrder,
    OrderCache,
    SourcePart,
    Stored,
    epoch_order,
    order_key,
)
from samba_megatron.platform.errors import UserError

_OPEN_DATASETS = 192
"""Each holds two files open; 1,024 are allowed to a process on many machines."""
_HELD_ORDERS = 512


@dataclass(frozen=True)
class SampleOptions:
    """How tokens become a sample."""

    sequence_length: int
    seed: int
    reset_position_ids: bool = False
    """Positions start again after each end-of-document token."""
    eod_mask_loss: bool = False
    """The loss does not count where the input is an end-of-document token."""
    eod: int = -1
    """The end-of-document token, where one of these needs it."""


class _LeastRecentlyUsed[K, V]:
    """Makes a thing when it is first asked for, and lets go of the one not used for longest."""

    def __init__(self, most: int, make: Callable[[K], V]) -> None:
        self._most, self._make = most, make
        self._held: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V:
        if key in self._held:
            self._held.move_to_end(key)
        else:
            self._held[key] = self._make(key)
            if len(self._held) > self._most:
                self._held.popitem(last=False)
        return self._held[key]


@dataclass(frozen=True)
class _OpenDataset:
    tokens: npt.NDArray[Any]
    """All token ids, mapped."""
    lengths: npt.NDArray[np.int32]
    """Tokens of each sequence, mapped."""
    pointers: npt.NDArray[np.int64]
    """Byte at which each sequence begins, mapped."""


class SourceReader:
    """The token ids of each source's samples, in the source's own order. Threads may share it."""

    def __init__(
        self,
        parts: Sequence[SourcePart],
        options: SampleOptions,
        cache: OrderCache,
        stored: Mapping[str, Stored],
    ) -> None:
        """Opens nothing.

        Args:
            parts: the sources.
            options: sequence length and seed are used here.
            cache: where the orders are.
            stored: which they are; an order that is not there is made when it is needed.
        """
        self.parts, self.options = parts, options
        self._cache, self._stored = cache, stored
        self._per_epoch = [part.samples_per_epoch(options.sequence_length) for part in parts]
        self._lock = threading.Lock()
        self._datasets = _LeastRecentlyUsed(_OPEN_DATASETS, self._open)
        self._orders = _LeastRecentlyUsed(_HELD_ORDERS, self._order)

    def read(self, source: int, number: int) -> npt.NDArray[np.int64]:
        """Tokens ``[sequence_length + 1]`` of sample ``number`` of a source, epochs counted on."""
        epoch, index = divmod(number, self._per_epoch[source])
        with self._lock:
            order = self._orders.get((source, epoch))
            dataset = self._datasets.get(source)
        sample = int(order.shuffle[index])
        place, offset = int(order.starts[sample]), int(order.offsets[sample])
        left = self.options.sequence_length + 1
        text = np.empty(left, np.int64)
        while left:
            sequence = order.documents[place]
            count = min(int(dataset.lengths[sequence]) - offset, left)
            first = int(dataset.pointers[sequence]) // dataset.tokens.itemsize + offset
            text[len(text) - left :][:count] = dataset.tokens[first : first + count]
            left, place, offset = left - count, place + 1, 0
        return text

    def _open(self, source: int) -> _OpenDataset:
        prefix = self.parts[source].prefix
        lengths, pointers, _, dtype = map_index(prefix)
        tokens = np.memmap(bin_path(prefix), mode="r", dtype=dtype)
        return _OpenDataset(tokens, lengths, pointers)

    def _order(self, which: tuple[int, int]) -> EpochOrder:
        source, epoch = which
        part, options = self.parts[source], self.options
        key = order_key(part, epoch, options.sequence_length, options.seed)
        if key in self._stored:
            return self._cache.load(self._stored[key])
        return epoch_order(part, epoch, options.sequence_length, options.seed)


def start_position(plan: Plan, parts: Sequence[SourcePart], ledger: Mapping[str, Any]) -> Position:
    """Where a run stands in a plan, given what it has consumed; the beginning if nothing."""
    keys = [part.fingerprint for part in parts]
    return from_ledger(ledger, plan, keys) if ledger else Position.start(len(parts))


class BlendedSamples:
    """The samples of a run in their global order, from where it starts.

    Sample ``i`` is a dict of ``tokens``, ``labels``, ``position_ids`` ``[s]`` int64 and
    ``loss_mask`` ``[s]`` float32, and ``source``, the number of its source.
    """

    def __init__(
        self,
        reader: SourceReader,
        plan: Plan,
        length: int,
        consumed: Mapping[str, Any] | None = None,
    ) -> None:
        """Puts the parts together; nothing is read.

        Args:
            reader: the sources.
            plan: which source comes next.
            length: samples of the whole run.
            consumed: the ledger that the run goes on from.
        """
        self._reader, self._options, self._plan = reader, reader.options, plan
        self._length = length
        self.go_on_from(consumed or {})
        self._positions = torch.arange(reader.options.sequence_length)

    def __len__(self) -> int:
        return self._length

    def go_on_from(self, ledger: Mapping[str, Any]) -> None:
        """Moves the start to where a ledger was kept; the beginning if it is empty."""
        start = start_position(self._plan, self._reader.parts, ledger)
        present = {part.fingerprint for part in self._reader.parts}
        self._start, self._order = start, BlendOrder(self._plan, start)
        self._carried = {
            key: {**entry, "origin": entry["samples"], "share": 0}
            for key, entry in ledger.get("sources", {}).items()
            if key not in present
        }

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        source, number = self.locate(index)
        text = torch.from_numpy(self._reader.read(source, number))
        tokens, labels = text[:-1], text[1:]
        ends = tokens == self._options.eod
        mask = torch.ones(len(tokens))
        if self._options.eod_mask_loss:
            mask[ends] = 0.0
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": mask,
            "position_ids": self._position_ids(ends),
            "source": torch.tensor(source),
        }

    def locate(self, index: int) -> tuple[int, int]:
        """The source of a sample, and its number in the source's order over all epochs."""
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        try:
            return self._order.locate(index)
        except BlendExhausted as end:
            raise UserError(
                f"the blend has no sample after {end.samples}: all its sources have reached "
                "max_epochs"
            ) from None

    def follow(self, samples: int) -> None:
        """Goes through the blend to ``samples`` of the run without reading, where nobody reads: so
        that the next ledger is quick there too."""
        if samples > self._order.start:
            self.locate(samples - 1)

    def ledger(self, samples: int) -> dict[str, Any]:
        """What each source has given after ``samples`` of the run; plain data for a checkpoint.

        Args:
            samples: consumed by all ranks, not less than where the run started.
        """
        position = self._order.position_at(samples)
        parts = self._reader.parts
        ledger = to_ledger(
            position,
            phase_shares(self._plan, position),
            [part.fingerprint for part in parts],
            [part.name for part in parts],
        )
        ledger["sources"] |= self._carried
        return ledger

    def consumed_by_source(self, samples: int) -> dict[str, dict[str, float]]:
        """Samples, tokens and epochs that each source has given after ``samples`` of the run."""
        length = self._options.sequence_length
        counts = self._order.position_at(samples).counts.tolist()
        return {
            part.name: {
                "samples": count,
                "tokens": count * length,
                "epochs": round(count / part.samples_per_epoch(length), 4),
            }
            for part, count in zip(self._reader.parts, counts, strict=True)
        }

    def summary(self) -> list[tuple[str, str]]:
        """What the run will read of each source, for a person."""
        parts, length = self._reader.parts, self._options.sequence_length
        return summarise(parts, self._plan, self._start, self._length, length)

    def _position_ids(self, ends: torch.Tensor) -> torch.Tensor:
        """Positions ``[s]``, from 0 again after each end of a document if so wished."""
        if not self._options.reset_position_ids:
            return self._positions
        starts = torch.zeros_like(self._positions)
        starts[1:][ends[:-1]] = self._positions[1:][ends[:-1]]
        return self._positions - starts.cummax(0).values
