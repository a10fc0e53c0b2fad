"""Times of calls: medians with their spread, by the device's own clock where it is a GPU."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from samba_megatron.ops.measuring import on_gpu, synchronize

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Outputs = Tensor | tuple[Tensor, ...]
"""Of a forward pass."""
_LEAST, _MOST = 3, 50
"""Calls that a median is of."""
_LONG = 1.5
"""A call of so many seconds is measured once."""
_CACHE = 256 * 2**20
"""Bytes written before a call, more than a GPU's second-level cache holds."""


@dataclass(frozen=True)
class Timing:
    """Of one call, in seconds."""

    median: float
    low: float
    high: float
    calls: int

    @staticmethod
    def of(seconds: list[float]) -> "Timing":
        """The median and the extremes."""
        return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))

    def milliseconds(self) -> list[float]:
        """Median, least and most."""
        return [round(1e3 * value, 5) for value in (self.median, self.low, self.high)]


def time_call(call: Callable[[], object], seconds: float) -> Timing:
    """Times calls for about so many seconds, after two that compile, tune and allocate.

    On a GPU nothing of the inputs is in the cache: it is written over before each call, which also
    gives the host the time to queue a short call's kernels.
    """
    call()
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    once = time.perf_counter() - start
    if once > _LONG:
        return Timing.of([once])
    calls = min(_MOST, max(_LEAST, int(seconds / max(once, 1e-9))))
    return Timing.of(_on_gpu(call, calls) if on_gpu() else _on_cpu(call, calls))


def _on_gpu(call: Callable[[], object], calls: int) -> list[float]:
    events = []
    for _ in range(calls):
        _cache_filler().zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [1e-3 * start.elapsed_time(end) for start, end in events]


@cache
def _cache_filler() -> Tensor:
    return torch.empty(_CACHE, dtype=torch.int8, device="cuda")


def _on_cpu(call: Callable[[], object], calls: int) -> list[float]:
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def time_passes(
    run: Callable[[], Outputs], leaves: list[Tensor], seconds: float, for_backward: bool = True
) -> tuple[Timing, Timing]:
    """Forward, and forward and backward.

    Args:
        run: the forward pass.
        leaves: what gradients are wanted of.
        seconds: for which each is measured.
        for_backward: whether the forward pass alone keeps what a backward pass needs.
    """
    outputs = run()
    weights = [torch.randn_like(y) for y in (outputs if isinstance(outputs, tuple) else [outputs])]
    with torch.set_grad_enabled(for_backward):
        forward = time_call(run, seconds)
    both = time_call(lambda: torch.autograd.grad(run(), leaves, weights), seconds)
    return forward, both


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy too large for any cache."""
    size = (2**30 if on_gpu() else 2**27) // 4
    source = torch.ones(size, device="cuda" if on_gpu() else "cpu")
    target = torch.empty_like(source)
    taken = time_call(lambda: target.copy_(source), 0.2)
    return 2 * 4 * size / taken.median


def release_memory() -> None:
    """Gives back what an earlier case has left."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch's error, or that of a library which words its own."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "out of memory" in str(error).lower()


def move(tensor: Tensor, **like: Any) -> Tensor:
    """A leaf that wants its gradient."""
    return tensor.detach().to(**like).requires_grad_()
