"""Small agreements between ranks: one acts on the disk, all learn what came of it."""

from collections.abc import Callable
from typing import Any

import torch

from samba_megatron.platform import distributed


def rank() -> int:
    """This process's rank in the world."""
    return int(torch.distributed.get_rank())


def on_rank_0[T](action: Callable[[], T]) -> T:
    """Runs ``action`` on rank 0 and gives its result, or raises its error, on every rank."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def gathered[T](value: T) -> list[T]:
    """The values of all ranks, by rank, on rank 0; elsewhere []."""
    values: list[Any] | None = None
    if rank() == 0:
        values = [None] * torch.distributed.get_world_size()
    torch.distributed.gather_object(value, values, dst=0)
    return values or []


def total(value: float) -> float:
    """Sum over all ranks, exact below 2**53."""
    return _reduced(value, torch.distributed.ReduceOp.SUM)


def largest(value: float) -> float:
    """Maximum over all ranks."""
    return _reduced(value, torch.distributed.ReduceOp.MAX)


def _reduced(value: float, operation: Any) -> float:
    tensor = torch.tensor([value], dtype=torch.float64, device=distributed.device())
    torch.distributed.all_reduce(tensor, op=operation)
    return float(tensor.item())
