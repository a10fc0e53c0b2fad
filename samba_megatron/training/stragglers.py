"""Ranks whose computing takes longer than their peers', named while the run goes on.

In a synchronous run the slowest rank sets the pace and all the others wait, so their step times are
equal: what tells is the time that a rank's own forward and backward passes take. It is gathered now
and then, one small collective, and compared among the ranks of a pipeline stage, which do the same
work. Tensor-parallel ranks wait for each other inside these passes and stand out together.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from samba_megatron.platform import distributed

_GAUSSIAN = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""
_DEVIATIONS = 6.0
_LEAST_EXCESS = 0.05
"""A part of the usual time: less is not worth a node's exchange."""
_FEWEST = 3
"""Among two, nobody knows which is the odd one."""


@dataclass(frozen=True)
class Straggler:
    """A rank that stands out."""

    rank: int
    node: str
    stage: int
    seconds: float
    """Forward and backward passes of a step."""
    typical_seconds: float
    """The median of its pipeline stage."""

    @property
    def slower(self) -> float:
        """By what part of the usual time."""
        return self.seconds / self.typical_seconds - 1

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.node} computes {self.seconds:.3f} s a step, "
            f"{100 * self.slower:.0f} % longer than its peers"
        )

    def record(self) -> dict[str, Any]:
        """For the metrics file."""
        return asdict(self) | {"slower": round(self.slower, 4)}


@dataclass(frozen=True)
class Comparison:
    """All ranks' times of computing, seconds a step."""

    summary: dict[str, float]
    """``min``, ``median``, ``max``."""
    stragglers: list[Straggler]


class RankTimes:
    """Collects this rank's times and compares them with the others'.

    Args:
        interval: steps between comparisons; None for none.
        stage: this rank's pipeline stage.
    """

    def __init__(self, interval: int | None, stage: int) -> None:
        self._interval = interval if torch.distributed.get_world_size() > 1 else None
        self._stage = stage
        self._seconds: list[float] = []

    def add(self, parts: dict[str, float]) -> None:
        """A step's parts, as the step's timers give them."""
        computing = ("forward", "backward", "graph")
        self._seconds.append(sum(parts.get(name, 0.0) for name in computing))

    def compare(self, step: int, nodes: Sequence[str]) -> Comparison | None:
        """Where the interval ends with ``step``, on every rank alike; else None.

        Args:
            step: its number.
            nodes: the ranks' nodes.
        """
        if not self._interval or step % self._interval or not self._seconds:
            return None
        # The median: a rank's one hiccup is no slowness.
        own = [statistics.median(self._seconds), float(self._stage)]
        self._seconds.clear()
        world = torch.distributed.get_world_size()
        mine = torch.tensor(own, dtype=torch.float64, device=distributed.device())
        gathered = [torch.empty_like(mine) for _ in range(world)]
        torch.distributed.all_gather(gathered, mine)
        rows = torch.stack(gathered).tolist()
        seconds, stages = [row[0] for row in rows], [int(row[1]) for row in rows]
        summary = {
            "min": round(min(seconds), 6),
            "median": round(statistics.median(seconds), 6),
            "max": round(max(seconds), 6),
        }
        return Comparison(summary, stand_out(seconds, stages, nodes))


def stand_out(
    seconds: Sequence[float], stages: Sequence[int], nodes: Sequence[str]
) -> list[Straggler]:
    """Ranks that are slower than their stage's median by six robust deviations and 5 %.

    Args:
        seconds: by rank.
        stages: each rank's pipeline stage; ranks are compared within it.
        nodes: each rank's node.
    """
    found = []
    for stage in sorted(set(stages)):
        ranks = [rank for rank, of in enumerate(stages) if of == stage]
        if len(ranks) < _FEWEST:
            continue
        usual = statistics.median(seconds[rank] for rank in ranks)
        scatter = statistics.median(abs(seconds[rank] - usual) for rank in ranks)
        limit = usual + max(_DEVIATIONS * _GAUSSIAN * scatter, _LEAST_EXCESS * usual)
        found += [
            Straggler(rank, nodes[rank], stage, seconds[rank], usual)
            for rank in ranks
            if seconds[rank] > limit
        ]
    return found
