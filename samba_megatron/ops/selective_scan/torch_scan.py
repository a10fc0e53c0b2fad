"""Backend "torch": the selective scan in plain PyTorch, on any device, differentiable throughout.

One autograd function holds the recurrence and all its element-wise surroundings (softplus, skip
D·u, gate silu(z)), so that besides the inputs only the states at chunk boundaries are kept for the
backward, a small part of all the states the scan runs through.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from samba_megatron.ops.precision import accumulation_dtype
from samba_megatron.ops.registry import ALL_DTYPES, CPU_AND_CUDA, Backend
from samba_megatron.ops.selective_scan.carry import Carry
from samba_megatron.ops.selective_scan.recurrence import Recurrence

SOFTPLUS_THRESHOLD = 20.0
"""Above it softplus is the identity, as in `torch.nn.functional.softplus`."""


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        initial_state: Tensor | None,
        reset: Tensor | None,
        delta_softplus: bool,
        keep_starts: bool,
        carry: Carry | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
        dtype = accumulation_dtype(*inputs)
        step = _step(delta, delta_bias, delta_softplus, dtype)
        recurrence = _recurrence(step, u, A, B, C, reset)
        start = recurrence.zero_state()
        if initial_state is not None:
            start.copy_(initial_state.transpose(1, 2))
        if carry is not None:
            start = carry(recurrence.total_decay(), recurrence.own_state(), False)
        y, final_state, starts = recurrence.forward(start, keep_starts)
        if D is not None:
            y.addcmul_(u.to(dtype), D.to(dtype))
        if z is not None:
            y.mul_(F.silu(z.to(dtype)))
        ctx.save_for_backward(*inputs, reset, *starts)
        ctx.delta_softplus, ctx.dtype, ctx.carry = delta_softplus, dtype, carry
        return y.to(u.dtype), final_state.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, delta_bias, initial_state, reset, *starts = ctx.saved_tensors
        dtype = ctx.dtype
        step = _step(delta, delta_bias, ctx.delta_softplus, dtype)
        recurrence = _recurrence(step, u, A, B, C, reset)
        u_wide, dout = u.to(dtype), dout.to(dtype)
        dy = dout if z is None else dout * F.silu(z.to(dtype))
        dfinal = dfinal.to(dtype).transpose(1, 2)
        if ctx.carry is not None:
            dfinal = ctx.carry(recurrence.total_decay(), recurrence.own_adjoint(dy), True)
        scan = recurrence.backward(starts, dy, dfinal)

        dz = dD = None
        du = scan.step_input * step
        if D is not None:
            dD = (dy * u_wide).sum((0, 1))
            du.addcmul_(dy, D.to(dtype))
            scan.y.addcmul_(u_wide, D.to(dtype))
        if z is not None:
            dz = torch.ops.aten.silu_backward(dout * scan.y, z.to(dtype))
        dstep = scan.step.addcmul_(scan.step_input, u_wide)
        ddelta = _step_backward(dstep, delta, delta_bias, ctx.delta_softplus)
        dbias = ddelta.sum((0, 1))
        dinitial = scan.initial_state.transpose(1, 2)
        inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
        gradients = (du, ddelta, scan.A.t(), scan.B, scan.C, dD, dz, dbias, dinitial)
        return (*map(_as_gradient_of, inputs, gradients), None, None, None, None)


def _recurrence(
    step: Tensor, u: Tensor, A: Tensor, B: Tensor, C: Tensor, reset: Tensor | None
) -> Recurrence:
    """The recurrence of the given [E, N] matrix and inputs in `step`'s dtype."""
    dtype = step.dtype
    rates = A.to(dtype).t().contiguous()
    return Recurrence(step, step * u.to(dtype), rates, B.to(dtype), C.to(dtype), reset)


def _biased(delta: Tensor, delta_bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    delta = delta.to(dtype)
    return delta if delta_bias is None else delta + delta_bias.to(dtype)


def _step(
    delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool, dtype: torch.dtype
) -> Tensor:
    """Δ = softplus(delta + bias), or delta + bias, as contiguous [L, b, E]."""
    delta = _biased(delta, delta_bias, dtype)
    return (
        F.softplus(delta, threshold=SOFTPLUS_THRESHOLD) if delta_softplus else delta
    ).contiguous()


def _step_backward(
    dstep: Tensor, delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool
) -> Tensor:
    """dL/d(delta + bias) from dL/dΔ."""
    if not delta_softplus:
        return dstep
    delta = _biased(delta, delta_bias, dstep.dtype)
    return torch.ops.aten.softplus_backward(dstep, delta, 1.0, SOFTPLUS_THRESHOLD)


def _as_gradient_of(tensor: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    return None if tensor is None or gradient is None else gradient.to(tensor.dtype)


def selective_scan_torch(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    carry: Carry | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`~samba_megatron.ops.selective_scan.reference.selective_scan_reference`.

    With a `carry`, that gives the initial state; the final state then has no gradient.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    keep_starts = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in inputs
    )
    return _SelectiveScan.apply(*inputs, reset, delta_softplus, keep_starts, carry)


BACKEND = Backend(
    name="torch",
    load=lambda: selective_scan_torch,
    devices=CPU_AND_CUDA,
    dtypes=ALL_DTYPES,
    features=frozenset({"initial_state", "final_state", "final_state_gradient", "reset", "carry"}),
)
