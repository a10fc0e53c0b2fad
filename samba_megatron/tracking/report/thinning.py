"""Fewer points that draw the same picture: what a screen cannot show need not be in the file."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def thinned(steps: Floats, values: Floats, limit: int) -> tuple[Floats, Floats]:
    """At most ``limit`` points: of each stretch its smallest and its largest value, in order.

    So a spike of one step stays. A stretch without a finite value keeps one NaN: a gap.
    """
    if len(steps) <= limit:
        return steps, values
    edges = np.linspace(0, len(steps), limit // 2 + 1).astype(int)
    kept: list[int] = []
    for start, stop in pairwise(edges):
        stretch = values[start:stop]
        if not np.isfinite(stretch).any():
            kept.append(int(start))
            continue
        finite = np.isfinite(stretch)
        low = int(start + np.where(finite, stretch, np.inf).argmin())
        high = int(start + np.where(finite, stretch, -np.inf).argmax())
        kept += sorted({low, high})
    return steps[kept], values[kept]


def averaged(steps: Floats, values: Floats, limit: int) -> tuple[Floats, Floats]:
    """At most ``limit`` points: the mean of each stretch's finite values, at its last step."""
    if len(steps) <= limit:
        return steps, values
    edges = np.linspace(0, len(steps), limit + 1).astype(int)
    finite = np.isfinite(values)
    sums = np.add.reduceat(np.where(finite, values, 0.0), edges[:-1])
    counts = np.add.reduceat(finite.astype(float), edges[:-1])
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return steps[edges[1:] - 1], means


def running_mean(values: Floats, window: int) -> Floats:
    """Mean of each value and up to ``window - 1`` before it; NaN where none of them is finite."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0.0], np.cumsum(finite)])
    first = np.maximum(np.arange(len(values)) - window + 1, 0)
    last = np.arange(1, len(values) + 1)
    number = counts[last] - counts[first]
    total = sums[last] - sums[first]
    return np.divide(total, number, out=np.full(len(values), np.nan), where=number > 0)
