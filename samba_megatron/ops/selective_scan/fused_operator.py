"""The fused scan as two operators of torch, forward and backward.

They take tensors and flags, and look their kernels up themselves. Arguments are cast and copied
before the operator, by torch, so that what is kept for the backward is what the kernels read. A
scan with a carry sends messages within each of its passes: it stays an autograd function.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from samba_megatron.ops.cost import scan_flops
from samba_megatron.ops.operators import define, differentiate
from samba_megatron.ops.selective_scan.fused.device import device_kernels
from samba_megatron.ops.selective_scan.fused.layout import LARGEST_CHUNK
from samba_megatron.ops.selective_scan.fused.scan import (
    ELEMENTS,
    Arguments,
    Gradients,
    Kernels,
    empty_in_order,
    prepare,
    run_backward,
    run_forward,
)

LOOKUPS: dict[str, Callable[[int, int, bool, bool, int], Kernels]] = {"cuda": device_kernels}
"""What finds the kernels for a type of device, by number of the dtype, states, gated, softplus and
number of the device."""
_TENSORS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor? initial_state, Tensor? reset"
)


def run_operators(given: Arguments, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    """Output [L, b, E] in u's dtype and final state [b, E, N] in fp32, differentiable once.

    Raises:
        ValueError: there is no position, sequence or channel.
    """
    u = given.u
    if u.numel() == 0:
        raise ValueError(f"the fused scan needs a position, a sequence and a channel: {u.shape}")
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    y, final_state, _ = SCAN(*prepare(given), delta_softplus, keep)
    return y.to(u.dtype), final_state


def _kernels(a: Arguments, softplus: bool) -> Kernels:
    states, gated = int(a.A.shape[1]), a.z is not None  # a compiler must know the states
    lookup = LOOKUPS[a.u.device.type]
    return lookup(ELEMENTS[a.u.dtype], states, gated, softplus, a.u.get_device())


def _chunk(a: Arguments, softplus: bool) -> int:
    """Steps between two states that are kept; the usual number where there is no such device."""
    device = a.u.device.type
    here = device in LOOKUPS and (device != "cuda" or torch.cuda.is_available())
    return _kernels(a, softplus).variant.chunk if here else LARGEST_CHUNK


def _as_read(tensors: list[Any]) -> Arguments:
    """What was prepared before, unless somebody changed its strides since."""
    a = Arguments(*tensors)
    rows, wholes = (a.u, a.delta, a.B, a.C, a.z), (a.A, a.D, a.delta_bias, a.initial_state, a.reset)
    unchanged = all(t is None or t.stride(-1) == 1 for t in rows)
    unchanged = unchanged and all(t is None or t.is_contiguous() for t in wholes)
    return a if unchanged else prepare(a)


def _run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output [L, b, E], final state [b, E, N], and the states before each chunk or nothing."""
    *tensors, softplus, keep = arguments
    a = _as_read(tensors)
    with torch.cuda.device_of(a.u):
        y, final_state, checkpoints = run_forward(_kernels(a, softplus), a, keep)
    return y, final_state, _or_empty(checkpoints, a)


def _rows(dy: Tensor) -> Tensor:
    return dy if dy.stride(-1) == 1 else dy.contiguous()


def _or_empty(tensor: Tensor | None, a: Arguments) -> Tensor:
    """An operator returns tensors only: an empty one stands for none."""
    return a.u.new_empty(0, dtype=torch.float32) if tensor is None else tensor


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, softplus, keep = arguments
    a = Arguments(*tensors)
    (length, batch, channels), states = a.u.shape, a.A.shape[1]
    final_state = a.u.new_empty(batch, channels, states, dtype=torch.float32)
    checkpoints = None
    if keep:
        chunks = -(-length // _chunk(a, softplus))
        checkpoints = final_state.new_empty(chunks, batch, channels, states)
    return empty_in_order(a.u, channels), final_state, _or_empty(checkpoints, a)


def _flops(u: torch.Size, delta: torch.Size, A: torch.Size, *others: Any) -> int:
    length, batch, channels = u
    return scan_flops(length * batch, channels, A[1])


def _run_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """All gradients, that of an absent z empty."""
    *tensors, softplus, checkpoints, dy, dfinal = arguments
    a = _as_read(tensors)
    dy = _rows(dy)
    dfinal = None if dfinal is None else dfinal.contiguous()
    with torch.cuda.device_of(a.u):
        gradients = run_backward(_kernels(a, softplus), a, checkpoints, dy, dfinal)
    return tuple(_or_empty(gradient, a) for gradient in gradients)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    a, dy = Arguments(*arguments[: len(Arguments._fields)]), _rows(arguments[-2])
    (_, batch, channels), states = a.u.shape, a.A.shape[1]

    def floats(*shape: int) -> Tensor:
        return a.u.new_empty(shape, dtype=torch.float32)

    return Gradients(  # type: ignore[return-value]
        u=empty_in_order(dy, channels),
        delta=empty_in_order(dy, channels),
        A=floats(channels, states),
        B=a.u.new_empty(a.B.shape),
        C=a.u.new_empty(a.B.shape),
        D=floats(channels),
        z=floats(0) if a.z is None else empty_in_order(dy, channels),
        delta_bias=floats(channels),
        initial_state=floats(batch, channels, states),
    )


def _flops_backward(*shapes: Any) -> int:
    return 2 * _flops(*shapes)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.softplus, keeps = inputs
    if not keeps:
        raise RuntimeError("a scan that is to be differentiated must keep its checkpoints")
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: Any) -> tuple[Any, ...]:
    *tensors, checkpoints = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    gradients = SCAN_BACKWARD(*tensors, ctx.softplus, checkpoints, dy, dfinal)
    wanted = [None if t is None else g for t, g in zip(tensors, gradients, strict=False)]
    return (*wanted, None, None, None)  # none of reset and the flags


SCAN = define(
    f"selective_scan({_TENSORS}, bool delta_softplus, bool keep_checkpoints)"
    " -> (Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _flops,
)
"""Activations in one dtype, parameters and state in fp32."""
SCAN_BACKWARD = define(
    f"selective_scan_backward({_TENSORS}, bool delta_softplus, Tensor checkpoints, Tensor dy, "
    "Tensor? dfinal) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    _flops_backward,
)
"""Its gradients, from those of output and final state."""
differentiate(SCAN, _keep, _differentiate, SCAN_BACKWARD)
