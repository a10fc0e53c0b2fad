"""Where a step's time goes: data, forward, backward, gradient reduction, pipeline bubble, update.

On a GPU the parts are timed by CUDA events in the compute stream, which cost microseconds and are
read where the step waits for the device anyway; on a CPU by the clock. Megatron's schedules say
when a part begins and ends (``config.timers``).
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from samba_megatron.platform import distributed

_WHOLE = "forward-backward"
_UPDATE = "optimizer"
_NAMES = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    "graph": "graph",
    "all-grads-sync": "gradient_reduce",
    "non-tensor-parallel-grads-all-reduce": "gradient_reduce",
    "embedding-grads-all-reduce": "gradient_reduce",
    _WHOLE: _WHOLE,
    _UPDATE: _UPDATE,
}
"""Megatron's parts and ours; its others are not timed."""


class Stopwatch:
    """Wall times of named parts on the host."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class StepClock:
    """Times steps, each from the end of the one before: the device goes on with an update when the
    host has left it, and what the host does between two steps is part of the second."""

    def __init__(self) -> None:
        self._start = 0.0
        self._left: float | None = None

    def begin(self) -> None:
        """A step begins."""
        self._start = time.perf_counter() if self._left is None else self._left

    def end(self, stalled: float) -> float:
        """Its seconds, without those that the loop was ``stalled`` since the step before."""
        start = self._start + stalled if self._start == self._left else self._start
        self._left = time.perf_counter()
        return self._left - start

    def interrupt(self) -> None:
        """Something that is no part of a step took its time: the next one begins when it does."""
        self._left = None


class _Clock:
    """Moments in the compute stream, or on the host where there is none."""

    def __init__(self, on_device: bool) -> None:
        self._on_device = on_device
        self._spare: list[Any] = []

    def now(self) -> Any:
        """This moment; a used event is used again."""
        if not self._on_device:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, stop: Any) -> float:
        """Seconds; the device must have passed both. The moments are not to be used again."""
        if not self._on_device:
            return stop - start
        seconds = start.elapsed_time(stop) / 1000
        self._spare += [start, stop]
        return seconds


class _Part:
    """One part of a step, with the two methods that megatron calls."""

    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        self._start: Any = None
        self.spans: list[tuple[Any, Any]] = []

    def start(self, barrier: bool = False) -> None:
        """Begins a span; ranks are never made to wait for each other."""
        self._start = self._clock.now()

    def stop(self, barrier: bool = False) -> None:
        """Ends it."""
        self.spans.append((self._start, self._clock.now()))

    def take(self) -> float | None:
        """Seconds of all spans since the last call; None without any."""
        spans, self.spans = self.spans, []
        return sum(self._clock.between(*span) for span in spans) if spans else None


class _NoPart:
    """What is not timed."""

    def start(self, barrier: bool = False) -> None:
        """Nothing."""

    def stop(self, barrier: bool = False) -> None:
        """Nothing."""


class StepTimers:
    """``config.timers`` for megatron's schedules, which times training steps alone.

    Args:
        on_device: by events of the GPU; else by the clock.
        has_pipeline: waits between the parts are a pipeline's bubble.
    """

    def __init__(self, on_device: bool, has_pipeline: bool) -> None:
        clock = _Clock(on_device)
        self._parts = {name: _Part(clock) for name in _NAMES}
        self._none = _NoPart()
        self._has_pipeline = has_pipeline
        self._running = False

    def __call__(self, name: str, log_level: int | None = None) -> _Part | _NoPart:
        """The part that megatron names."""
        if not self._running:
            return self._none
        return self._parts.get(name, self._none)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside, the schedule is that of a training step."""
        for name, part in self._parts.items():
            if name != _UPDATE:
                part.spans = []
        self._running = True
        try:
            yield
        finally:
            self._running = False

    @contextmanager
    def update(self) -> Iterator[None]:
        """Inside, the optimizer updates the weights."""
        part = self._parts[_UPDATE]
        part.start()
        yield
        part.stop()

    def read(self) -> dict[str, float]:
        """Seconds by part, when the device is known to be past this step's backward pass.

        ``forward`` and ``backward`` (with recomputation) of all micro-batches, or ``graph`` where
        one CUDA graph is both; ``gradient_reduce``, what of it is not hidden behind the backward
        pass; ``bubble``, the rest of a pipeline's time. ``optimizer`` is the update before this
        step, whose work lies in its time: the device is not made to wait for the update after it.
        """
        taken: dict[str, float] = {}
        for name, part in self._parts.items():
            if (seconds := part.take()) is not None:
                taken[_NAMES[name]] = taken.get(_NAMES[name], 0.0) + seconds
        whole = taken.pop(_WHOLE, None)
        if self._has_pipeline and whole is not None:
            busy = sum(taken.get(name, 0.0) for name in ("forward", "backward", "gradient_reduce"))
            taken["bubble"] = max(whole - busy, 0.0)
        return taken


def attach_timers(chunks: Sequence[Any]) -> StepTimers:
    """Has the schedules of these model chunks tell new timers what they do."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_model_config

    timers = StepTimers(
        on_device=distributed.device_type() == "cuda",
        has_pipeline=parallel_state.get_pipeline_model_parallel_world_size() > 1,
    )
    get_model_config(chunks[0]).timers = timers
    return timers
