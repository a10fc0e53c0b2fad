"""Training samples of a blend: numbered, made when they are asked for.

Datasets are opened at their first sample and at most so many are held open: a run over thousands
of prefixes stays under the limit on open files, and a rank pays only for what it reads.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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
from samba_megatron.data.loss_masks import map_mask
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
    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """Documents end to end and cut, or whole by best fit."""
    reset_at_document_boundaries: bool = False
    """Samples say where documents begin."""
    eod_mask_loss: bool = False
    """The loss does not count where the input is an end-of-document token."""
    eod: int = -1
    """The end-of-document token, where that needs it."""
    loss_masks: bool = False
    """The loss counts where the mask beside a dataset says so."""


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
    mask: npt.NDArray[np.uint8] | None
    """1 where the loss counts, mapped; None: everywhere."""


class TokensAndLabels(NamedTuple):
    """One sample of a source."""

    tokens: npt.NDArray[np.int64]
    """``[sequence_length]``."""
    labels: npt.NDArray[np.int64]
    """What follows each ``[sequence_length]``."""
    filled: int
    """The positions after these are padding."""
    counted: npt.NDArray[np.uint8] | None
    """1 where the loss counts ``[filled]``; None: everywhere."""


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
        self._length = options.sequence_length
        self._cache, self._stored = cache, stored
        self._per_epoch = [part.samples_per_epoch(options.sequence_length) for part in parts]
        self._lock = threading.Lock()
        self._datasets = _LeastRecentlyUsed(_OPEN_DATASETS, self._open)
        self._orders = _LeastRecentlyUsed(_HELD_ORDERS, self._order)

    def read(self, source: int, number: int) -> TokensAndLabels:
        """Sample ``number`` of a source, epochs counted on."""
        dataset, pieces = self._pieces(source, number)
        if self.parts[source].packed is None:
            text = np.concatenate(
                [dataset.tokens[first : first + count] for first, count in pieces], dtype=np.int64
            )
            counted = _counted(dataset, pieces)
            counted = None if counted is None else counted[1:]
            return TokensAndLabels(text[:-1], text[1:], len(text) - 1, counted)
        tokens, labels = np.zeros((2, self._length), np.int64)
        at = 0
        for first, count in pieces:
            text = dataset.tokens[first : first + count + 1]
            tokens[at : at + count], labels[at : at + count] = text[:-1], text[1:]
            at += count
        ends = [(first + 1, count) for first, count in pieces]
        return TokensAndLabels(tokens, labels, at, _counted(dataset, ends))

    def document_start(self, source: int, number: int) -> npt.NDArray[np.bool_]:
        """Where in the tokens ``[sequence_length]`` of a sample a document begins, or what is in it
        of one: so always at the first; and where padding does. Reads no tokens."""
        _, pieces = self._pieces(source, number)
        starts = np.zeros(self._length + 2, np.bool_)
        starts[np.cumsum([0, *(count for _, count in pieces)])] = True
        return starts[: self._length]

    def _pieces(self, source: int, number: int) -> tuple[_OpenDataset, list[tuple[int, int]]]:
        """The stretches of documents that make a sample: each one's first token in its dataset, and
        how many positions of the sample it takes, of which the last one may be for a label only."""
        epoch, index = divmod(number, self._per_epoch[source])
        with self._lock:
            order = self._orders.get((source, epoch))
            dataset = self._datasets.get(source)
        sample = int(order.shuffle[index])
        packed = self.parts[source].packed is not None
        stretches = self._packed(order, sample) if packed else self._joined(order, sample, dataset)
        size, pieces = dataset.tokens.itemsize, []
        for sequence, offset, most in stretches:
            count = min(int(dataset.lengths[sequence]) - offset - packed, most)
            pieces.append((int(dataset.pointers[sequence]) // size + offset, count))
        return dataset, pieces

    def _packed(self, order: EpochOrder, sample: int) -> Iterator[tuple[int, int, int]]:
        """Sequences, the first token of each, and how many positions it may take."""
        for piece in range(int(order.starts[sample]), int(order.starts[sample + 1])):
            yield int(order.documents[piece]), int(order.offsets[piece]), self._length

    def _joined(
        self, order: EpochOrder, sample: int, dataset: _OpenDataset
    ) -> Iterator[tuple[int, int, int]]:
        """The same for sequences end to end, with one position more for the last label."""
        place, offset = int(order.starts[sample]), int(order.offsets[sample])
        left = self._length + 1
        while left:
            sequence = int(order.documents[place])
            count = min(int(dataset.lengths[sequence]) - offset, left)
            if count:
                yield sequence, offset, left
            left, place, offset = left - count, place + 1, 0

    def _open(self, source: int) -> _OpenDataset:
        prefix = self.parts[source].prefix
        lengths, pointers, _, dtype = map_index(prefix)
        tokens = np.memmap(bin_path(prefix), mode="r", dtype=dtype)
        mask = map_mask(prefix) if self.options.loss_masks else None
        return _OpenDataset(tokens, lengths, pointers, mask)

    def _order(self, which: tuple[int, int]) -> EpochOrder:
        source, epoch = which
        part, options = self.parts[source], self.options
        key = order_key(part, epoch, options.sequence_length, options.seed)
        if key in self._stored:
            return self._cache.load(self._stored[key])
        return epoch_order(part, epoch, options.sequence_length, options.seed)


def _counted(
    dataset: _OpenDataset, stretches: list[tuple[int, int]]
) -> npt.NDArray[np.uint8] | None:
    """What the mask says of stretches of tokens, one after another; None: there is no mask."""
    if dataset.mask is None:
        return None
    return np.concatenate([dataset.mask[first : first + count] for first, count in stretches])


def start_position(plan: Plan, parts: Sequence[SourcePart], ledger: Mapping[str, Any]) -> Position:
    """Where a run stands in a plan, given what it has consumed; the beginning if nothing."""
    keys = [part.fingerprint for part in parts]
    return from_ledger(ledger, plan, keys) if ledger else Position.start(len(parts))


class BlendedSamples:
    """The samples of a run in their global order, from where it starts.

    Sample ``i`` is a dict of ``tokens``, ``labels``, ``position_ids`` ``[s]`` int64, ``loss_mask``
    ``[s]`` float32, ``source``, the number of its source, and with
    ``reset_at_document_boundaries`` ``document_start`` ``[s]`` bool.
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
        sample = self._reader.read(source, number)
        tokens, labels = torch.from_numpy(sample.tokens), torch.from_numpy(sample.labels)
        mask = torch.ones(len(tokens))
        mask[sample.filled :] = 0.0
        if sample.counted is not None:
            mask[: sample.filled] = torch.from_numpy(sample.counted).float()
        if self._options.eod_mask_loss:
            mask[tokens == self._options.eod] = 0.0
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": mask,
            "position_ids": self._positions,
            "source": torch.tensor(source),
            **self._boundaries(source, number),
        }

    def boundaries(self, index: int) -> dict[str, torch.Tensor]:
        """Of sample ``index`` only where documents begin, if samples say so: for the stages of a
        pipeline that need no tokens."""
        return self._boundaries(*self.locate(index))

    def _boundaries(self, source: int, number: int) -> dict[str, torch.Tensor]:
        if not self._options.reset_at_document_boundaries:
            return {}
        return {"document_start": torch.from_numpy(self._reader.document_start(source, number))}

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
