"""Which source comes next: the order of a blend, and the ledger of what each source has given.

Every source has its own order of samples and a position in it; a blend decides only whose turn it
is. So shares can change at any moment (a stage ends, a source reaches its cap, somebody resumes
with other weights) and no source repeats or loses a sample.

A *phase* is a stretch of samples with the same shares. Within it, slot ``k`` goes to the source
whose sample is due first: with share ``w``, a source's sample ``j`` is released at slot
``floor(j / w)`` and due before ``ceil((j + 1) / w)``. Earliest due first meets all dates with one
processor and unit jobs (Baruah et al., *Proportionate progress*, 1996), so after any number of
slots each source has given its share to within one sample, and the whole state is the counts.
Shares are integers here (of 2^53), so that nothing depends on rounding.
"""

import heapq
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]

_WHOLE = 1 << 53
_BLOCK = 1024
_KEPT_BLOCKS = 64


class BlendExhausted(Exception):
    """No source with a share has a sample left."""

    def __init__(self, samples: int) -> None:
        super().__init__(f"the blend ends after {samples} samples")
        self.samples = samples


@dataclass(frozen=True)
class PlanStage:
    """Shares up to a sample of the run."""

    end: int | None
    """The first sample that is no longer of the stage; None: there is none."""
    shares: tuple[int, ...]
    """By source, of any sum; 0 for a source that is not read."""


@dataclass(frozen=True)
class Plan:
    """What decides the order, given what has been consumed."""

    stages: tuple[PlanStage, ...]
    """The last has no end."""
    limits: tuple[int | None, ...]
    """The most samples of each source over the whole run."""

    def stage_at(self, sample: int) -> PlanStage:
        """The stage of a sample."""
        for stage in self.stages:
            if stage.end is None or sample < stage.end:
                return stage
        raise AssertionError("the last stage of a plan has no end")


@dataclass(frozen=True)
class Position:
    """How far a run has come in a blend."""

    samples: int
    """Samples of the run behind us."""
    counts: Counts
    """How many each source has given ``[sources]``."""
    origin: int
    """The sample at which the present phase began."""
    origin_counts: Counts
    """``counts`` at that sample."""

    @staticmethod
    def start(sources: int) -> "Position":
        """The beginning of a run."""
        zeros = np.zeros(sources, np.int64)
        return Position(0, zeros, 0, zeros)


def whole_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """Weights as integers that sum to about 2^53; a positive weight stays positive."""
    total = math.fsum(weights)
    return tuple(max(1, round(w / total * _WHOLE)) if w > 0 else 0 for w in weights)


def phase_shares(plan: Plan, position: Position) -> tuple[int, ...]:
    """The shares in the phase of a position: those of its stage, without what was used up."""
    return tuple(
        0 if limit is not None and count >= limit else share
        for share, count, limit in zip(
            plan.stage_at(position.origin).shares,
            position.origin_counts.tolist(),
            plan.limits,
            strict=True,
        )
    )


class BlendWalker:
    """Goes through a blend sample by sample. How it is cut into calls does not matter."""

    def __init__(self, plan: Plan, position: Position) -> None:
        self._plan = plan
        self._samples = position.samples
        self._counts: list[int] = position.counts.tolist()
        self._enter(position)

    @property
    def position(self) -> Position:
        """Where it stands."""
        return Position(
            self._samples, np.array(self._counts, np.int64), self._origin, self._origin_counts
        )

    def take(self, count: int) -> tuple[list[int], list[int]]:
        """The next ``count`` samples: the source of each, and its number in the source's order.

        Raises:
            BlendExhausted: there are not so many.
        """
        sources: list[int] = []
        numbers: list[int] = []
        while len(sources) < count:
            if self._phase_is_over():
                self._enter(self._new_phase())
            room = count - len(sources)
            if self._end is not None:
                room = min(room, self._end - self._samples)
            self._run(room, sources, numbers)
        return sources, numbers

    def _phase_is_over(self) -> bool:
        return (self._end is not None and self._samples >= self._end) or any(
            self._counts[source] >= limit for source, limit in self._limits.items()
        )

    def _new_phase(self) -> Position:
        counts = np.array(self._counts, np.int64)
        return Position(self._samples, counts, self._samples, counts)

    def _enter(self, position: Position) -> None:
        """Takes up the phase of a position, at whatever point of it the counts are."""
        self._origin, self._origin_counts = position.origin, position.origin_counts
        self._end = self._plan.stage_at(position.origin).end
        self._shares = phase_shares(self._plan, position)
        self._whole = sum(self._shares)
        if not self._whole:
            raise BlendExhausted(position.samples)
        active = [source for source, share in enumerate(self._shares) if share]
        limits = {source: self._plan.limits[source] for source in active}
        self._limits = {source: limit for source, limit in limits.items() if limit is not None}
        self._given: list[int] = (position.counts - position.origin_counts).tolist()
        self._waiting = [(self._given[s] * self._whole // self._shares[s], s) for s in active]
        heapq.heapify(self._waiting)
        self._ready: list[tuple[int, int]] = []

    def _run(self, room: int, sources: list[int], numbers: list[int]) -> None:
        """Fills up to ``room`` slots; stops where a source reaches its limit."""
        whole, shares, given, counts = self._whole, self._shares, self._given, self._counts
        waiting, ready, limits = self._waiting, self._ready, self._limits
        slot = self._samples - self._origin
        last = slot + room
        while slot < last:
            while waiting and waiting[0][0] <= slot:
                source = heapq.heappop(waiting)[1]
                due = -(-(given[source] + 1) * whole // shares[source])
                heapq.heappush(ready, (due, source))
            source = heapq.heappop(ready)[1]
            sources.append(source)
            numbers.append(counts[source])
            counts[source] += 1
            given[source] += 1
            slot += 1
            heapq.heappush(waiting, (given[source] * whole // shares[source], source))
            if source in limits and counts[source] >= limits[source]:
                break
        self._samples = self._origin + slot


@dataclass(frozen=True)
class _Block:
    before: Position
    sources: list[int]
    numbers: list[int]


class BlendOrder:
    """The samples of a blend by number, from where a run starts; made as they are asked for.

    Blocks just made are kept, so that reading on and reading ahead is cheap; asking for a sample
    long past goes through the blend from the start again. Threads may share it.
    """

    def __init__(self, plan: Plan, start: Position) -> None:
        self._plan, self._start = plan, start
        self._lock = threading.Lock()
        self._blocks: OrderedDict[int, _Block] = OrderedDict()
        self._rewind()

    @property
    def start(self) -> int:
        """The first sample that can be asked for."""
        return self._start.samples

    def locate(self, sample: int) -> tuple[int, int]:
        """The source of a sample of the run, and the sample's number in the source's order.

        Raises:
            IndexError: it is before the start.
            BlendExhausted: the blend ends before it.
        """
        number, offset = self._place(sample)
        with self._lock:
            block = self._block(number, offset + 1)
            return block.sources[offset], block.numbers[offset]

    def position_at(self, samples: int) -> Position:
        """The state after so many samples of the run."""
        number, offset = self._place(samples)
        with self._lock:
            if offset == 0 and number:
                number, offset = number - 1, _BLOCK
            before = self._block(number, offset).before
        walker = BlendWalker(self._plan, before)
        walker.take(offset)
        return walker.position

    def _place(self, sample: int) -> tuple[int, int]:
        if sample < self.start:
            raise IndexError(f"sample {sample} is before {self.start}, where this run starts")
        return divmod(sample - self.start, _BLOCK)

    def _rewind(self) -> None:
        self._walker = BlendWalker(self._plan, self._start)
        self._next = 0

    def _block(self, number: int, least: int) -> _Block:
        """Block ``number`` with at least ``least`` samples: the last may be cut by the end."""
        block = self._blocks.get(number)
        if block is not None and len(block.sources) >= least:
            return block
        if number < self._next:
            self._rewind()
        while self._next <= number:
            before = self._walker.position
            sources, numbers = self._take_block(before)
            self._blocks[self._next] = _Block(before, sources, numbers)
            self._blocks.move_to_end(self._next)
            self._next += 1
            if len(self._blocks) > _KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        block = self._blocks[number]
        if len(block.sources) < least:
            raise BlendExhausted(block.before.samples + len(block.sources))
        return block

    def _take_block(self, before: Position) -> tuple[list[int], list[int]]:
        try:
            return self._walker.take(_BLOCK)
        except BlendExhausted as end:
            self._walker = BlendWalker(self._plan, before)
            return self._walker.take(end.samples - before.samples)


@dataclass(frozen=True)
class Projection:
    """What a run will have taken of each source, to within a few samples."""

    counts: npt.NDArray[np.float64]
    """At the end of the run ``[sources]``."""
    used_up: dict[int, int]
    """Sources that reach their limit, and the sample of the run at which they do."""
    end: int
    """The sample at which the projection ends: before the asked one if the blend is exhausted."""


def project(plan: Plan, position: Position, end: int) -> Projection:
    """Follows a plan from a position to sample ``end`` without going through each sample."""
    counts = position.counts.astype(np.float64)
    limits = np.array([np.inf if limit is None else limit for limit in plan.limits])
    now, used_up = float(position.samples), dict[int, int]()
    while now < end:
        stage = plan.stage_at(round(now))
        shares = np.where(counts < limits - 0.5, np.array(stage.shares, np.float64), 0.0)
        if not shares.sum():
            return Projection(counts, used_up, round(now))
        rates = shares / shares.sum()
        stop = float(end if stage.end is None else min(end, stage.end))
        with np.errstate(divide="ignore", invalid="ignore"):
            left = np.where(rates > 0, (limits - counts) / rates, np.inf)
        first = int(left.argmin())
        reached = now + left[first] < stop
        step = float(left[first]) if reached else stop - now
        counts = counts + rates * step
        now += step
        for source in np.flatnonzero((rates > 0) & (counts >= limits - 0.5)).tolist():
            used_up[source] = round(now)
    return Projection(counts, used_up, end)


def to_ledger(
    position: Position, shares: Sequence[int], keys: Sequence[str], names: Sequence[str]
) -> dict[str, Any]:
    """A position in plain data, by source: what a checkpoint keeps.

    Args:
        position: the state.
        shares: of the present phase.
        keys: what tells each source's content, wherever it lies.
        names: for a person.
    """
    sources = {
        key: {"name": name, "samples": count, "origin": origin, "share": share}
        for key, name, count, origin, share in zip(
            keys,
            names,
            position.counts.tolist(),
            position.origin_counts.tolist(),
            shares,
            strict=True,
        )
    }
    return {"samples": position.samples, "origin": position.origin, "sources": sources}


def from_ledger(ledger: Mapping[str, Any], plan: Plan, keys: Sequence[str]) -> Position:
    """The position of a ledger in a plan that may be another one than that which it was kept under.

    With the same shares the phase goes on; otherwise a new one begins here. Sources that the
    ledger does not have start at their first sample.
    """
    none = {"samples": 0, "origin": 0, "share": 0}
    entries = [ledger["sources"].get(key, none) for key in keys]
    counts = np.array([entry["samples"] for entry in entries], np.int64)
    origin_counts = np.array([entry["origin"] for entry in entries], np.int64)
    samples = ledger["samples"]
    going_on = Position(samples, counts, ledger["origin"], origin_counts)
    present = set(keys)
    gone = any(e["share"] for key, e in ledger["sources"].items() if key not in present)
    if not gone and phase_shares(plan, going_on) == tuple(entry["share"] for entry in entries):
        return going_on
    return Position(samples, counts, samples, counts)
