"""Head and loss written out, all logits at once: what the chunked one is held against."""

from typing import Any

import torch
from torch import Tensor

from samba_megatron.ops.precision import accumulation_dtype
from samba_megatron.ops.registry import ALL_DTYPES, CPU_AND_CUDA, Backend


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, target: Tensor, loss_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """loss = log Σ exp(logits) - logits[target], logits = hidden · weightᵀ.

    Args:
        hidden: [n, d].
        weight: [V, d].
        target: whole numbers [n]; a negative one is ignored.
        loss_weights: [n], what each token counts in the sum.

    Returns:
        The weighted sum of the losses; and each [n], a constant. fp32, or fp64 where an input is.
    """
    logits = (hidden @ weight.t()).to(accumulation_dtype(hidden, weight))
    rows, ignored = torch.arange(len(target), device=target.device), target < 0
    own = logits[rows, target.clamp(min=0, max=weight.shape[0] - 1)]
    losses = (logits.logsumexp(-1) - own).masked_fill(ignored, 0.0)
    losses = losses.masked_fill(target >= weight.shape[0], float("nan"))
    return (losses * loss_weights.to(losses)).sum(), losses.detach()


def _run(
    hidden: Tensor, weight: Tensor, target: Tensor, loss_weights: Tensor, **unused: Any
) -> tuple[Tensor, Tensor]:
    return linear_cross_entropy_reference(hidden, weight, target, loss_weights)


BACKEND = Backend(
    name="reference",
    load=lambda: _run,
    devices=CPU_AND_CUDA,
    dtypes=ALL_DTYPES,
    features=frozenset(),
)
