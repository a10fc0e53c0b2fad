"""Backend "triton": SwiGLU and its gradient, one pass over memory each.

Both halves of the gradient are written where they belong; a compiler that concatenates two
expressions reads their inputs twice. Everything is fp32 between the load and the store.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from samba_megatron.ops.registry import CUDA_ONLY, FLOAT_DTYPES, Backend

BLOCK = 1024
"""Columns of a program: 16 bytes a thread and load in half precision."""


def make_kernels() -> tuple[Any, Any]:
    """The forward and the backward kernel.

    They are made when they are first needed, because a machine without a GPU may lack Triton.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def swiglu_forward(x, y, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(x + row * 2 * width + column, inside, other=0.0).to(tl.float32)
        up = tl.load(x + row * 2 * width + width + column, inside, other=0.0).to(tl.float32)
        result = gate * tl.sigmoid(gate) * up
        tl.store(y + row * width + column, result.to(y.dtype.element_ty), inside)

    @triton.jit
    def swiglu_backward(x, dy, dx, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        gate = tl.load(x + row * 2 * width + column, inside, other=0.0).to(tl.float32)
        up = tl.load(x + row * 2 * width + width + column, inside, other=0.0).to(tl.float32)
        dout = tl.load(dy + row * width + column, inside, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        dgate = dout * up * share * (1.0 + gate * (1.0 - share))
        dup = dout * gate * share
        tl.store(dx + row * 2 * width + column, dgate.to(dx.dtype.element_ty), inside)
        tl.store(dx + row * 2 * width + width + column, dup.to(dx.dtype.element_ty), inside)

    return swiglu_forward, swiglu_backward


def _load() -> Callable[[Tensor], Tensor]:
    kernels = make_kernels()

    def run(x: Tensor) -> Tensor:
        """As :func:`~samba_megatron.ops.swiglu.reference.swiglu_reference`."""
        return SwiGLU.apply(x, kernels)

    return run


def _grid(rows: int, width: int) -> tuple[int, int]:
    return rows, -(-width // BLOCK)


class SwiGLU(torch.autograd.Function):
    """The two kernels as one differentiable function; keeps its input for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: tuple[Any, Any]) -> Tensor:
        """[..., 2F] → [..., F]."""
        x = x.contiguous()
        width = x.shape[-1] // 2
        y = x.new_empty((*x.shape[:-1], width))
        if y.numel():
            kernels[0][_grid(y.numel() // width, width)](x, y, width, BLOCK)
        ctx.save_for_backward(x)
        ctx.kernels = kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        """[..., F] → [..., 2F]."""
        (x,) = ctx.saved_tensors
        dx, width = torch.empty_like(x), dy.shape[-1]
        if dy.numel():
            grid = _grid(dy.numel() // width, width)
            ctx.kernels[1][grid](x, dy.contiguous(), dx, width, BLOCK)
        return dx, None


BACKEND = Backend(
    name="triton",
    load=_load,
    devices=CUDA_ONLY,
    dtypes=FLOAT_DTYPES,
    features=frozenset(),
    package="triton",
)
