"""Backend "fused": the selective scan in kernels of this project, differentiable throughout.

They read Megatron's [time, batch, channel] as it lies (halves of one tensor included), apply
softplus, skip and gate on the way, and keep only the state before each chunk of 32 steps for the
backward, as much memory as one activation in half precision. Nothing is accumulated with atomics:
the same call gives the same bits. A card with more room than a batch has channels is filled by
cutting time into segments (see `layout.divide`). Where other ranks hold the time before and after
(`carry`), each segment is a rank's: the same two passes, with messages in between.
"""

import ctypes
import importlib
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from samba_megatron.ops.registry import CUDA_ONLY, FLOAT_DTYPES, Backend, Request
from samba_megatron.ops.selective_scan.carry import Carry
from samba_megatron.ops.selective_scan.fused.layout import (
    THREADS,
    BackwardArguments,
    CombineArguments,
    ForwardArguments,
    Plan,
    ReduceArguments,
    Strided,
    Variant,
    divide,
)

ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
STATES = (8, 16, 32, 64)
"""Every d_state that the kernels are made for."""
SPLIT_FORWARD_BELOW = 0.5
SPLIT_BACKWARD_BELOW = 0.7
"""Shares of the card's blocks under which time is cut: the forward then runs nearly twice, the
backward a quarter longer."""


class Kernels(Protocol):
    """What runs the kernels: a GPU, or in tests a CPU."""

    variant: Variant

    def workers(self, kernel: str) -> int:
        """Blocks that run at once."""

    def launch(self, kernel: str, blocks: int, arguments: ctypes.Structure) -> None:
        """Runs a kernel after all that were launched before."""


class Arguments(NamedTuple):
    """A call's tensors as the kernels take them."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None
    reset: Tensor | None


def activation_dtype(a: Arguments) -> torch.dtype:
    """What the kernels take activations in: their dtype, or fp32 if they have several."""
    dtypes = {t.dtype for t in (a.u, a.delta, a.z, a.B, a.C) if t is not None}
    return a.u.dtype if len(dtypes) == 1 else torch.float32


def prepare(a: Arguments) -> Arguments:
    """Activations in one dtype with contiguous channels, parameters in contiguous fp32."""
    dtype = activation_dtype(a)

    def activation(tensor: Tensor) -> Tensor:
        return _rows(tensor.to(dtype))

    def parameter(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.float().contiguous()

    return Arguments(
        u=activation(a.u),
        delta=activation(a.delta),
        A=a.A.float().contiguous(),
        B=activation(a.B),
        C=activation(a.C),
        D=parameter(a.D),
        z=None if a.z is None else activation(a.z),
        delta_bias=parameter(a.delta_bias),
        initial_state=parameter(a.initial_state),
        reset=None if a.reset is None else a.reset.contiguous(),
    )


def _rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _strided(tensor: Tensor | None) -> Strided:
    if tensor is None:
        return Strided(None, 0, 0)
    strides = [tensor.stride(dim) * tensor.element_size() for dim in (0, 1)]
    if max(strides) >= 2**31:
        raise ValueError(f"the fused scan takes strides under 2 GB, not {max(strides)} bytes")
    return Strided(tensor.data_ptr(), *strides)


def empty_in_order(like: Tensor, channels: int) -> Tensor:
    """A new [L, b, channels] whose memory has time and batch in the order in which ``like`` has
    them: sequences that lie end to end come out so."""
    length, batch = like.shape[:2]
    if like.stride(0) < like.stride(1):
        return like.new_empty(batch, length, channels).transpose(0, 1)
    return like.new_empty(length, batch, channels)


def _floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _division(kernels: Kernels, kernel: str, a: Arguments, split_below: float) -> tuple[Plan, int]:
    length, batch, channels = a.u.shape
    workers = kernels.workers(kernel)
    return divide(length, batch, channels, kernels.variant.chunk, workers, split_below)


def _jobs(plan: Plan) -> int:
    return int(plan.batch * plan.channel_blocks * plan.segments)


def _flags(plan: Plan, like: Tensor) -> Tensor:
    return torch.zeros(_jobs(plan), dtype=torch.int32, device=like.device)


def _run_segments(
    kernels: Kernels,
    kernel: str,
    division: tuple[Plan, int],
    a: Arguments,
    x: Tensor,
    projection: Tensor,
    outer: Tensor | None,
    carry: Carry | None,
) -> Tensor:
    """What enters each segment [segment, batch, channel, state].

    Args:
        kernel: "scan_segments", or "scan_adjoint_segments" for the gradient of the state, backward
            in time.
        x: u, or the gradient of the output.
        projection: B, or C.
        outer: what enters the first segment [batch, channel, state], or None for zeros.
        carry: says what enters the first segment.
    """
    (plan, blocks), (batch, channels) = division, x.shape[1:]
    backward_in_time = kernel == "scan_adjoint_segments"
    states = kernels.variant.states
    local = _floats(x, plan.segments, batch, channels, states)
    total_step = _floats(x, plan.segments, batch, channels)
    handed_over = _floats(x, _jobs(plan), kernels.variant.forward_carry, THREADS)
    flags = _flags(plan, x)
    arguments = ForwardArguments(
        plan=plan,
        u=_strided(x),
        delta=_strided(a.delta),
        z=_strided(a.z),
        B=_strided(projection),
        C=_strided(projection),
        A=_pointer(a.A),
        delta_bias=_pointer(a.delta_bias),
        reset=_pointer(a.reset),
        end=_pointer(local),
        total_step=_pointer(total_step),
        carry=_pointer(handed_over),
        flags=_pointer(flags),
    )
    kernels.launch(kernel, blocks, arguments)
    if carry is not None:
        decay, state = _whole(local, total_step, a.A, backward_in_time)
        outer = carry(decay, state, backward_in_time).contiguous()
    start = torch.empty_like(local)
    combine = CombineArguments(
        segments=plan.segments,
        batch=batch,
        channels=channels,
        backward_in_time=backward_in_time,
        A=_pointer(a.A),
        outer=_pointer(outer),
        local=_pointer(local),
        total_step=_pointer(total_step),
        start=_pointer(start),
    )
    kernels.launch("combine_segments", -(-batch * channels * states // THREADS), combine)
    return start


def _whole(
    local: Tensor, total_step: Tensor, A: Tensor, backward_in_time: bool
) -> tuple[Tensor, Tensor]:
    """Decay and state of all segments together [batch, channel, state], from each one's own."""

    def decay_of(step: Tensor) -> Tensor:
        decay = torch.exp(step.unsqueeze(-1) * A)
        return decay.masked_fill_(step.isinf().unsqueeze(-1), 0.0)  # a document starts there

    order = range(local.shape[0])
    state = torch.zeros_like(local[0])
    for segment in reversed(order) if backward_in_time else order:
        state = torch.addcmul(local[segment], decay_of(total_step[segment]), state)
    return decay_of(total_step.sum(0)), state


def run_forward(
    kernels: Kernels, a: Arguments, keep_checkpoints: bool, carry: Carry | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The output [L, b, E], the final state [b, E, N] and the states before each chunk."""
    batch, channels = a.u.shape[1:]
    variant = kernels.variant
    division = _division(kernels, "scan_forward", a, SPLIT_FORWARD_BELOW)
    plan, blocks = division
    start = a.initial_state
    if plan.segments > 1 or carry is not None:
        start = _run_segments(kernels, "scan_segments", division, a, a.u, a.B, start, carry)
    y = empty_in_order(a.u, channels)
    final_state = _floats(y, batch, channels, variant.states)
    checkpoints = (
        _floats(y, plan.chunks, batch, channels, variant.states) if keep_checkpoints else None
    )
    handed_over = _floats(y, _jobs(plan), variant.forward_carry, THREADS)
    flags = _flags(plan, y)
    arguments = ForwardArguments(
        plan=plan,
        **_common(a),
        start=_pointer(start),
        y=_strided(y),
        checkpoints=_pointer(checkpoints),
        end=_pointer(final_state),
        carry=_pointer(handed_over),
        flags=_pointer(flags),
    )
    kernels.launch("scan_forward", blocks, arguments)
    return y, final_state, checkpoints


def _common(a: Arguments) -> dict[str, Any]:
    """The fields that forward and backward share."""
    tensors = {name: _strided(getattr(a, name)) for name in ("u", "delta", "z", "B", "C")}
    parameters = {name: _pointer(getattr(a, name)) for name in ("A", "D", "delta_bias", "reset")}
    return tensors | parameters


class Gradients(NamedTuple):
    """Of the loss with respect to each argument."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor | None
    delta_bias: Tensor
    initial_state: Tensor


def run_backward(
    kernels: Kernels,
    a: Arguments,
    checkpoints: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    carry: Carry | None = None,
) -> Gradients:
    """All gradients, from those of the output [L, b, E] and of the final state [b, E, N]; with a
    carry, from what that brings in the latter's place."""
    length, batch, channels = a.u.shape
    variant = kernels.variant
    division = _division(kernels, "scan_backward", a, SPLIT_BACKWARD_BELOW)
    plan, blocks = division
    dend = dfinal
    if plan.segments > 1 or carry is not None:
        kernel = "scan_adjoint_segments"
        dend = _run_segments(kernels, kernel, division, a, dy, a.C, dfinal, carry)
    a, dy = _paired(a), _in_pairs(dy)
    width = channels + channels % 2
    du, ddelta = (empty_in_order(dy, width)[..., :channels] for _ in range(2))
    dz = None if a.z is None else empty_in_order(dy, width)[..., :channels]
    dprojections = _floats(dy, plan.channel_blocks, length, batch, 2 * variant.states)
    dA = _floats(dy, plan.segments * batch, channels, variant.states)
    dD, dbias = (_floats(dy, plan.segments * batch, channels) for _ in range(2))
    dinitial = _floats(dy, batch, channels, variant.states)
    handed_over = _floats(dy, _jobs(plan), variant.backward_carry, THREADS)
    flags = _flags(plan, dy)
    arguments = BackwardArguments(
        plan=plan,
        **_common(a),
        dy=_strided(dy),
        checkpoints=_pointer(checkpoints),
        dend=_pointer(dend),
        du=_strided(du),
        ddelta=_strided(ddelta),
        dz=_strided(dz),
        dprojections=_pointer(dprojections),
        dA=_pointer(dA),
        dD=_pointer(dD),
        dbias=_pointer(dbias),
        dstart=_pointer(dinitial),
        carry=_pointer(handed_over),
        flags=_pointer(flags),
    )
    kernels.launch("scan_backward", blocks, arguments)
    dB, dC = (du.new_empty(length, batch, variant.states) for _ in range(2))
    _reduce(kernels, plan, dprojections, dB, dC)
    return Gradients(
        u=_dense(du),
        delta=_dense(ddelta),
        A=dA.sum(0),
        B=dB,
        C=dC,
        D=dD.sum(0),
        z=None if dz is None else _dense(dz),
        delta_bias=dbias.sum(0),
        initial_state=dinitial,
    )


def _dense(padded: Tensor) -> Tensor:
    """Without the room for another channel, which only an odd number of them has."""
    channels = padded.shape[-1]
    if min(padded.stride()[:2]) == channels:
        return padded
    return empty_in_order(padded, channels).copy_(padded)


def _paired(a: Arguments) -> Arguments:
    """The arguments with activations whose channels the backward can read two at a time."""
    z = None if a.z is None else _in_pairs(a.z)
    return a._replace(u=_in_pairs(a.u), delta=_in_pairs(a.delta), z=z)


def _in_pairs(tensor: Tensor) -> Tensor:
    """The tensor [L, b, E], or a copy if its channels cannot be read two at a time.

    After an odd number of channels comes one of zeros.
    """
    channels = tensor.shape[-1]
    steps = (tensor.data_ptr() // tensor.element_size(), *tensor.stride()[:2], channels)
    if not any(step % 2 for step in steps):
        return tensor
    padded = tensor.new_zeros(*tensor.shape[:2], channels + channels % 2)
    padded[..., :channels] = tensor
    return padded[..., :channels]


def _reduce(kernels: Kernels, plan: Plan, parts: Tensor, dB: Tensor, dC: Tensor) -> None:
    arguments = ReduceArguments(
        tokens=plan.length * plan.batch,
        channel_blocks=plan.channel_blocks,
        dprojections=_pointer(parts),
        dB=_pointer(dB),
        dC=_pointer(dC),
    )
    kernels.launch("reduce_projections", -(-2 * dB.numel() // THREADS), arguments)


class _FusedScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, keep: bool, carry: Carry | None, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        given = Arguments(*tensors)  # type: ignore[arg-type]
        a = prepare(given)
        y, final_state, checkpoints = run_forward(kernels, a, keep, carry)
        if keep:
            ctx.save_for_backward(*a, checkpoints)
            ctx.kernels, ctx.carry = kernels, carry
            ctx.dtypes = [None if t is None else t.dtype for t in tensors]
            ctx.set_materialize_grads(False)
        return y.to(given.u.dtype), final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        *saved, checkpoints = ctx.saved_tensors
        a = Arguments(*saved)
        dy = torch.zeros_like(a.u) if dy is None else _rows(dy.to(a.u.dtype))
        dfinal = None if dfinal is None else dfinal.float().contiguous()
        with _device_of(a.u):
            gradients = run_backward(ctx.kernels, a, checkpoints, dy, dfinal, ctx.carry)
        cast = [
            None if dtype is None or gradient is None else gradient.to(dtype)
            for dtype, gradient in zip(ctx.dtypes, gradients, strict=False)
        ]
        return (None, None, None, *cast, None)


def _device_of(tensor: Tensor) -> torch.cuda.device:
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def fused_scan(
    kernels: Kernels, arguments: Arguments, carry: Carry | None = None
) -> tuple[Tensor, Tensor]:
    """The scan by given kernels, which must be those of a variant that fits the arguments."""
    u = arguments.u
    if u.numel() == 0:
        raise ValueError(f"the fused scan needs a position, a sequence and a channel: {u.shape}")
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments)
    with _device_of(u):
        y, final_state = _FusedScan.apply(kernels, keep, carry, *arguments)
    return y, final_state


def selective_scan_fused(
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
    from samba_megatron.ops.selective_scan.fused.device import device_kernels
    from samba_megatron.ops.selective_scan.fused_operator import run_operators

    arguments = Arguments(u, delta, A, B, C, D, z, delta_bias, initial_state, reset)
    if carry is None:
        return run_operators(arguments, delta_softplus)
    kernels = device_kernels(
        ELEMENTS[activation_dtype(arguments)],
        A.shape[1],
        z is not None,
        delta_softplus,
        u.get_device(),
    )
    return fused_scan(kernels, arguments, carry)


def _load() -> Any:
    """The function, once it is certain that kernels can be compiled and run here."""
    from samba_megatron.ops.selective_scan.fused.device import require_support

    # Defines the operators, and not while a call is traced.
    importlib.import_module("samba_megatron.ops.selective_scan.fused_operator")
    require_support()
    return selective_scan_fused


def _refuses(request: Request) -> str | None:
    d_state = request.sizes["d_state"]
    if d_state not in STATES:
        return f"it takes d_state {', '.join(map(str, STATES))}, not {d_state}"
    return None


BACKEND = Backend(
    name="fused",
    load=_load,
    devices=CUDA_ONLY,
    dtypes=FLOAT_DTYPES,
    features=frozenset({"initial_state", "final_state", "final_state_gradient", "reset", "carry"}),
    refuses=_refuses,
)
