"""The product with the head's weight and the cross-entropy, some tokens at a time.

With V columns, the logits of a micro-batch and their gradient are by far its largest tensors, and
nobody needs them twice: the loss is a weighted sum, so the logits' gradient is known, but for one
factor, as soon as they are. So each chunk of tokens makes its logits, their softmax statistics, and
while the logits are there, over them, their gradient, and from that its part of the gradients of
hidden states and weight. The backward pass only multiplies by the factor that it is given. Three
matrix products, as ever.

From the forward to the backward pass stay one gradient of hidden states' size, and the weight's in
fp32 (it is a sum over chunks): V·d numbers where there were tokens·V.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from samba_megatron.ops.cost import chunk_tokens
from samba_megatron.ops.precision import accumulation_dtype


class Softmax(NamedTuple):
    """The two passes over a chunk's logits [c, V]; ``target`` [c] counts from their first column
    and is outside them where another rank has it."""

    statistics: Callable[[Tensor, Tensor], Tensor]
    """(logits, target) → [3, c]: the largest logit m, Σ exp(logit - m), the target's logit or 0."""
    to_gradient: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    """(logits, target, normalizer [c], weights [c]): in place,
    logits ← (exp(logits - normalizer) - [column is target]) · weight."""


class How(NamedTuple):
    """What of a call is no tensor."""

    softmax: Softmax
    group: ProcessGroup | None
    """Ranks that share the vocabulary, or None for one alone."""
    chunk: int | None
    """Tokens at once; None for :func:`~samba_megatron.ops.cost.chunk_tokens`."""
    into_main_grad: bool
    """Add the weight's gradient to ``weight.main_grad``."""


class _Computed(NamedTuple):
    losses: Tensor
    dhidden: Tensor | None
    dweight: Tensor | None


def chunked(softmax: Softmax) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operation over an implementation of the softmax, as a backend's kernel."""

    def run(
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        loss_weights: Tensor,
        group: ProcessGroup | None = None,
        into_main_grad: bool = False,
        chunk: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        how = How(softmax, group, chunk, into_main_grad)
        ignored = target < 0
        counted = loss_weights.to(accumulation_dtype(hidden, weight)).masked_fill(ignored, 0.0)
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            return _LinearCrossEntropy.apply(hidden, weight, target, counted, how)
        with torch.no_grad():
            losses = _compute(hidden, weight, target, counted, how, False, False).losses
            return (losses * counted).sum(), losses

    return run


class _LinearCrossEntropy(torch.autograd.Function):
    """The sum with the gradients that were made with it; keeps neither inputs nor logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, weights: Tensor, how: How
    ) -> tuple[Tensor, Tensor]:
        """→ weighted sum, losses [n]."""
        wanted = ctx.needs_input_grad
        computed = _compute(hidden, weight, target, weights, how, wanted[0], wanted[1])
        ctx.gradients, ctx.weight = (computed.dhidden, computed.dweight), weight
        ctx.into_main_grad = how.into_main_grad
        ctx.mark_non_differentiable(computed.losses)
        return (computed.losses * weights).sum(), computed.losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The factor [] of the sum's gradient → gradients of hidden states and weight."""
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were handed over: compute it again")
        (dhidden, dweight), weight = ctx.gradients, ctx.weight
        ctx.gradients = ctx.weight = None
        # As a vector the factor keeps its own precision in a product with bf16.
        factor = dtotal.reshape(1)
        if dhidden is not None:
            dhidden.mul_(factor)
        if dweight is not None:
            dweight.mul_(factor)
            if ctx.into_main_grad:
                dweight = _into_main_grad(dweight, weight)
            else:
                dweight = dweight.to(weight.dtype)
        return dhidden, dweight, None, None, None


def _into_main_grad(gradient: Tensor, weight: Any) -> Tensor:
    """Adds to megatron's gradient buffer, and tells its hook so.

    Returns:
        Zeros for autograd, which must have something for the hook to run where it runs always;
        where the weight is the embedding's too, they are added to that gradient.
    """
    weight.main_grad.add_(gradient)
    weight.grad_added_to_main_grad = True
    return weight.new_zeros(()).expand_as(weight)


def _compute(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    weights: Tensor,
    how: How,
    hidden_wanted: bool,
    weight_wanted: bool,
) -> _Computed:
    """All chunks: losses [n], and the wanted gradients of their sum weighted by ``weights`` [n]."""
    (tokens, _), columns = hidden.shape, weight.shape[0]
    wide = accumulation_dtype(hidden, weight)
    size = how.chunk or chunk_tokens(tokens, columns, hidden.element_size())
    first_column = how.group.rank() * columns if how.group else 0
    losses = hidden.new_empty(tokens, dtype=wide)
    dhidden = torch.empty_like(hidden) if hidden_wanted else None
    dweight = torch.zeros_like(weight, dtype=wide) if weight_wanted else None
    buffer = hidden.new_empty(min(size, tokens), columns)
    for start in range(0, tokens, size):
        part = slice(start, start + size)
        own, local = hidden[part], target[part] - first_column
        logits = torch.mm(own, weight.t(), out=buffer[: len(own)])
        normalizer, losses[part] = _whole(how.softmax.statistics(logits, local), how.group)
        if dhidden is None and dweight is None:
            continue
        how.softmax.to_gradient(logits, local, normalizer, weights[part])
        if dhidden is not None:
            torch.mm(logits, weight, out=dhidden[part])
        if dweight is not None:
            _add_product(dweight, logits.t(), own)
    vocabulary = columns * (how.group.size() if how.group else 1)
    losses.masked_fill_(target < 0, 0.0).masked_fill_(target >= vocabulary, float("nan"))
    return _Computed(losses, dhidden, dweight)


def _whole(statistics: Tensor, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """From a part's [3, c]: log Σ exp(logits) over the whole vocabulary, and the losses, [c]."""
    largest, total, own = statistics
    if group is not None:
        # One message: three numbers a token of every rank, joined here.
        parts = statistics.new_empty(group.size() * 3, statistics.shape[1])
        torch.distributed.all_gather_into_tensor(parts, statistics.contiguous(), group=group)
        maxima, totals, owns = parts.view(group.size(), 3, -1).unbind(1)
        largest = maxima.amax(0)
        total = (totals * (maxima - largest).exp()).sum(0)
        own = owns.sum(0)
    normalizer = largest + total.log()
    return normalizer, normalizer - own


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [V, d] += left [V, c] · right [c, d], added up in total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
