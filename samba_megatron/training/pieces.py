"""Sequences that go through the model piece by piece: any length in the memory of one piece.

Megatron's schedule is given every piece as a micro-batch of its own. With truncated gradients the
pieces come in the order of time, and what one leaves to the next is a constant to it. With exact
ones they come backwards: a first pass without gradients finds what each piece takes over; then each
is computed again with it, the last first, and the gradient of what it took over is handed to the
piece before as the gradient of what that leaves. That is the whole sequence's gradient, for the
price of the first pass (as full recomputation) and of what is carried between the pieces.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from samba_megatron.data.stream import Batch, Piece
from samba_megatron.model.head import Losses
from samba_megatron.ops.continued import Past

if TYPE_CHECKING:
    from torch import nn

LossOf = Callable[[Losses], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""Losses [b, s], or their sum → (their sum, how many count, what to report)."""
RunPiece = Callable[[Batch, Past, "nn.Module"], tuple[Losses, LossOf]]
"""A piece's batch through the model, going on from a past: its losses, and what sums them."""


class InPieces:
    """megatron's forward step over pieces; one object for one call of the schedule.

    Args:
        run: computes one piece.
        number: pieces of a sequence.
        exact: whether gradients flow from piece to piece.
    """

    def __init__(self, run: RunPiece, number: int, exact: bool) -> None:
        self._run, self._number, self._exact = run, number, exact
        self._batch: Batch = {}
        self._left: list[int] = []
        self._pasts: list[dict[str, Tensor]] = []
        self._following: dict[str, Tensor] = {}
        """What the piece after the present one took over, with gradients by now."""

    def forward_step(
        self, iterator: Iterator[Batch | None], model: "nn.Module"
    ) -> tuple[Losses, LossOf]:
        """The next piece; of the next batch when the last one is done."""
        if not self._left:
            self._begin(iterator, model)
        number = self._left.pop(0)
        before = self._pasts[number]
        wants_gradients = self._exact and torch.is_grad_enabled()
        if wants_gradients:
            before = {name: tensor.detach().requires_grad_() for name, tensor in before.items()}
        losses, loss_of, after = self._piece(number, before, model)
        self._pasts[number] = {}  # nobody needs it any more
        if not wants_gradients:
            self._pasts.append(_kept(after))
            return losses, loss_of
        handed_back = [
            (after[name], taken.grad)
            for name, taken in self._following.items()
            if taken.grad is not None and after[name].requires_grad
        ]
        self._following = before
        return losses, partial(_with_what_follows, loss_of, handed_back)

    def _begin(self, iterator: Iterator[Batch | None], model: "nn.Module") -> None:
        batch = next(iterator)
        assert batch is not None, "without a pipeline every rank has data"
        self._batch, self._pasts, self._following = batch, [{}], {}
        self._left = list(range(self._number))
        if not (self._exact and torch.is_grad_enabled()):
            return
        self._left.reverse()
        # Nobody reads the first pass's logits.
        with torch.no_grad(), get_attr_wrapped_model(model, "without_head")():
            for number in range(self._number - 1):
                after = self._piece(number, self._pasts[number], model)[2]
                self._pasts.append(_kept(after))

    def _piece(
        self, number: int, before: dict[str, Tensor], model: "nn.Module"
    ) -> tuple[Losses, LossOf, dict[str, Tensor]]:
        piece = Piece(number, self._number)
        batch = piece.cut(self._batch)
        tokens = batch["tokens"]
        assert tokens is not None
        past = Past(number * tokens.shape[1], before)
        losses, loss_of = self._run(batch, past, model)
        return losses, loss_of, past.after


def _kept(after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Constants, and no views that would keep all of the piece alive."""
    return {name: tensor.detach().clone() for name, tensor in after.items()}


def _with_what_follows(
    loss_of: LossOf, handed_back: list[tuple[Tensor, Tensor]], losses: Losses
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A piece's loss, whose backward pass takes along the gradients of what the piece left."""
    total, count, report = loss_of(losses)
    if handed_back:
        left, gradients = zip(*handed_back, strict=True)
        total = _HandBack.apply(total, list(gradients), *left)
    return total, count, report


class _HandBack(torch.autograd.Function):
    """The loss as it is; backward, given gradients go to given tensors.

    They are those of the later pieces' losses, which megatron has scaled as it scales this one: so
    they are not scaled again.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, gradients: list[Tensor], *left: Tensor) -> Tensor:
        """The loss."""
        ctx.gradients = gradients
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the loss and of the tensors that were left."""
        return dtotal, None, *ctx.gradients
