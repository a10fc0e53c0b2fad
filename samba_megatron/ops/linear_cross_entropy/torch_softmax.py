"""Backend "torch": the chunked head and loss with the softmax in plain torch."""

import torch
from torch import Tensor

from samba_megatron.ops.linear_cross_entropy.chunked import Softmax, chunked
from samba_megatron.ops.precision import accumulation_dtype
from samba_megatron.ops.registry import ALL_DTYPES, CPU_AND_CUDA, Backend


def statistics(logits: Tensor, target: Tensor) -> Tensor:
    """As :attr:`~samba_megatron.ops.linear_cross_entropy.chunked.Softmax.statistics`."""
    wide = logits.to(accumulation_dtype(logits))
    rows, inside = _own(logits, target)
    largest = wide.amax(-1)
    own = torch.zeros_like(largest)
    own[rows] = wide[rows, inside]
    return torch.stack([largest, (wide - largest[:, None]).exp_().sum(-1), own])


def to_gradient(logits: Tensor, target: Tensor, normalizer: Tensor, weights: Tensor) -> None:
    """As :attr:`~samba_megatron.ops.linear_cross_entropy.chunked.Softmax.to_gradient`."""
    gradient = (logits.to(normalizer.dtype) - normalizer[:, None]).exp_()
    gradient[_own(logits, target)] -= 1.0
    logits.copy_(gradient.mul_(weights[:, None]))


def _own(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the targets that are among these columns."""
    (rows,) = torch.where((target >= 0) & (target < logits.shape[1]))
    return rows, target[rows]


BACKEND = Backend(
    name="torch",
    load=lambda: chunked(Softmax(statistics, to_gradient)),
    devices=CPU_AND_CUDA,
    dtypes=ALL_DTYPES,
    features=frozenset({"vocabulary_parallel", "main_grad"}),
)
