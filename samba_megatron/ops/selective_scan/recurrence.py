"""The selective scan's recurrence and its adjoint, one chunk of time at a time, in plain torch.

h_t = exp(Δ_t A) h_{t-1} + Δ_t u_t B_t and y_t = C_t · h_t (arXiv 2312.00752, equation 2a with the
discretisation of Algorithm 2) run over time in place on [b, N, E] slabs, in buffers that are used
again for every chunk: the working set stays in cache whatever the sequence length, and the only
thing kept of a chunk is the state it starts from.

Channels are innermost, so that every large operation runs over contiguous memory. The decay is
exp2(Δ·A·log2 e), which vectorises better than exp. Nothing is divided by a decay, so the result is
exact for any step: a decay that underflows is simply 0. Sums avoid matrix multiplications, which a
user may have told torch to round to TF32 or bf16.

Shapes here: L time, T time within a chunk, b batch, N d_state, E channels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_LENGTH = {"cpu": 16, "cuda": 64}
"""Time steps a chunk, by device type: on a CPU a chunk should fit its cache, on a GPU it should
amortise kernel launches. It depends on nothing else, so that the order of every sum over time is
the same for any batch and any tensor-parallel share of the channels."""


class ScanGradients(NamedTuple):
    """What the adjoint yields; `y` is the forward's output, recomputed."""

    step: Tensor
    """[L, b, E], through the decay only."""
    step_input: Tensor
    """[L, b, E], with respect to the product Δ·u."""
    A: Tensor
    """[N, E]."""
    B: Tensor
    """[L, b, N]."""
    C: Tensor
    """[L, b, N]."""
    initial_state: Tensor
    """[b, N, E]."""
    y: Tensor
    """[L, b, E]."""


class Recurrence:
    """The recurrence for given inputs, all of one floating dtype."""

    def __init__(
        self,
        step: Tensor,
        step_input: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        reset: Tensor | None,
    ) -> None:
        """Takes Δ and Δ·u as [L, b, E], A as [N, E], B and C as [L, b, N], reset as [L, b]."""
        length, batch, channels = step.shape
        chunk = min(CHUNK_LENGTH.get(step.device.type, max(CHUNK_LENGTH.values())), length)
        self.step, self.step_input = step.unsqueeze(2), step_input.unsqueeze(2)
        self.B, self.C = B.unsqueeze(3), C.unsqueeze(3)
        self.A, self.A_log2 = A, (A.double() * math.log2(math.e)).to(A.dtype)
        self.chunks = [(lo, min(lo + chunk, length)) for lo in range(0, length, chunk)]
        self.reset, self.chunk_resets = reset, _chunks_with_reset(reset, self.chunks)
        self.decay = step.new_empty((chunk, batch, A.shape[0], channels))
        self.states = step.new_empty((chunk + 1, *self.decay.shape[1:]))
        self.product = torch.empty_like(self.decay)
        # One view a step, made once: slicing in the loops would cost as much as the arithmetic.
        self.decay_steps, self.state_steps = self.decay.unbind(0), self.states.unbind(0)

    def zero_state(self) -> Tensor:
        """A state [b, N, E] of zeros."""
        return torch.zeros_like(self.state_steps[0])

    def fill(self, index: int, start: Tensor) -> tuple[Tensor, Tensor]:
        """Computes chunk `index` from state `start` [b, N, E].

        Returns the decays [T, b, N, E] and the states [T + 1, b, N, E], of which the first is
        `start`. Both lie in buffers that the next call overwrites.
        """
        lo, hi = self.chunks[index]
        decay, states = self._fill_decay(index), self.states[: hi - lo + 1]
        states[0].copy_(start)
        torch.mul(self.step_input[lo:hi], self.B[lo:hi], out=states[1:])
        state = self.state_steps[0]
        for step_decay, step_state in zip(
            self.decay_steps[: hi - lo], self.state_steps[1:], strict=False
        ):
            state = step_state.addcmul_(step_decay, state)
        return decay, states

    def total_decay(self) -> Tensor:
        """The product of all decays [b, N, E]; zero where a document starts."""
        total = torch.exp2(self.step.sum(0) * self.A_log2)
        if self.reset is not None:
            total.masked_fill_(self.reset.any(0)[:, None, None], 0.0)
        return total

    def own_state(self) -> Tensor:
        """The final state [b, N, E] from a state of zeros."""
        state = self.zero_state()
        for index in range(len(self.chunks)):
            _, states = self.fill(index, state)
            state = states[-1]
        return state.clone()

    def own_adjoint(self, dy: Tensor) -> Tensor:
        """The gradient of the initial state [b, N, E], from dL/dy and none of the final state."""
        after = self.zero_state()
        for index in reversed(range(len(self.chunks))):
            lo, hi = self.chunks[index]
            decay = self._fill_decay(index)
            dstate = torch.mul(self.C[lo:hi], dy[lo:hi].unsqueeze(2), out=self.product[: hi - lo])
            steps = zip(dstate.unbind(0)[::-1], decay.unbind(0)[::-1], strict=True)
            for own, step_decay in steps:
                after = own.add_(after).mul_(step_decay)
            after = after.clone()
        return after

    def _fill_decay(self, index: int) -> Tensor:
        """The decays of chunk `index` [T, b, N, E], in a buffer that the next call overwrites."""
        lo, hi = self.chunks[index]
        decay = self.decay[: hi - lo]
        torch.mul(self.step[lo:hi], self.A_log2, out=decay)
        torch.exp2(decay, out=decay)
        if self.reset is not None and self.chunk_resets[index]:
            decay.masked_fill_(self.reset[lo:hi, :, None, None], 0.0)
        return decay

    def forward(self, start: Tensor, keep_starts: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Returns y [L, b, E], the final state [b, N, E] and, if kept, each chunk's start."""
        y = torch.empty_like(self.step).squeeze(2)
        starts = []
        state = start
        for index, (lo, hi) in enumerate(self.chunks):
            if keep_starts:
                starts.append(state.clone())
            _, states = self.fill(index, state)
            self._sum_product(states[1:], self.C[lo:hi], dim=2, out=y[lo:hi])
            state = states[-1]
        return y, state.clone(), starts

    def backward(self, starts: Sequence[Tensor], dy: Tensor, dfinal: Tensor) -> ScanGradients:
        """The adjoint, from `starts` as :meth:`forward` kept them, dL/dy and dL/d(final state)."""
        gradients = ScanGradients(
            step=torch.empty_like(dy),
            step_input=torch.empty_like(dy),
            A=torch.zeros_like(self.A),
            B=torch.empty_like(self.B).squeeze(3),
            C=torch.empty_like(self.C).squeeze(3),
            initial_state=dfinal.clone(memory_format=torch.contiguous_format),
            y=torch.empty_like(dy),
        )
        buffer = torch.empty_like(self.decay)
        for index in reversed(range(len(self.chunks))):
            self._backward_chunk(index, starts[index], dy, buffer, gradients)
        return gradients

    def _backward_chunk(
        self, index: int, start: Tensor, dy: Tensor, buffer: Tensor, gradients: ScanGradients
    ) -> None:
        """Fills the chunk's part of `gradients`, whose `initial_state` carries dL/dh backward."""
        lo, hi = self.chunks[index]
        decay, states = self.fill(index, start)
        C, dy = self.C[lo:hi], dy[lo:hi].unsqueeze(2)
        self._sum_product(states[1:], C, dim=2, out=gradients.y[lo:hi])
        self._sum_product(states[1:], dy, dim=3, out=gradients.C[lo:hi])

        dstate = torch.mul(C, dy, out=buffer[: hi - lo])
        steps = dstate.unbind(0)
        after = steps[-1].add_(gradients.initial_state)
        for before, step_decay in zip(
            steps[-2::-1], self.decay_steps[hi - lo - 1 :: -1], strict=False
        ):
            after = before.addcmul_(step_decay, after)
        self._sum_product(dstate, self.step_input[lo:hi], dim=3, out=gradients.B[lo:hi])
        self._sum_product(dstate, self.B[lo:hi], dim=2, out=gradients.step_input[lo:hi])

        dprevious = dstate.mul_(decay)
        gradients.initial_state.copy_(dprevious[0])
        dexponent = dprevious.mul_(states[:-1])
        self._sum_product(dexponent, self.A, dim=2, out=gradients.step[lo:hi])
        product = torch.mul(dexponent, self.step[lo:hi], out=self.product[: hi - lo])
        gradients.A.add_(product.flatten(0, 1).sum(0))

    def _sum_product(self, left: Tensor, right: Tensor, dim: int, out: Tensor) -> None:
        """`out` = Σ over `dim` of left·right, for one chunk."""
        product = torch.mul(left, right, out=self.product[: left.shape[0]])
        torch.sum(product, dim=dim, out=out)


def _chunks_with_reset(reset: Tensor | None, chunks: Sequence[tuple[int, int]]) -> list[bool]:
    """Which chunks hold a document start: the others skip the masking."""
    if reset is None:
        return [False] * len(chunks)
    starts = reset.any(dim=1).tolist()
    return [any(starts[lo:hi]) for lo, hi in chunks]
