"""Backend "triton": SwiGLU and its gradient, one pass over memory each.

Both halves of the gradient are written where they belong; a compiler that concatenates two
expressions reads their inputs twice. Everything is fp32 between the load and the store.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from samba_megatron.ops.cost import Passes, swiglu_work
from samba_megatron.ops.operators import define, differentiate
from samba_megatron.ops.registry import CUDA_ONLY, FLOAT_DTYPES, Backend

BLOCK = 1024
"""Columns of a program: 16 bytes a thread and load in half precision."""


@cache
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
    make_kernels()
    return swiglu_triton


def swiglu_triton(x: Tensor) -> Tensor:
    """As :func:`~samba_megatron.ops.swiglu.reference.swiglu_reference`, differentiable once."""
    return _SWIGLU(x.contiguous())


def _grid(rows: int, width: int) -> tuple[int, int]:
    return rows, -(-width // BLOCK)


def _run(x: Tensor) -> Tensor:
    """[..., 2F] → [..., F]."""
    x, y = x.contiguous(), _fake(x)
    width = y.shape[-1]
    if y.numel():
        make_kernels()[0][_grid(y.numel() // width, width)](x, y, width, BLOCK)
    return y


def _fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _run_backward(x: Tensor, dy: Tensor) -> Tensor:
    """[..., F] → [..., 2F]."""
    dx, width = _fake_backward(x, dy), dy.shape[-1]
    if dy.numel():
        grid = _grid(dy.numel() // width, width)
        make_kernels()[1][grid](x.contiguous(), dy.contiguous(), dx, width, BLOCK)
    return dx


def _fake_backward(x: Tensor, dy: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _work(x: torch.Size, *_: Any) -> Passes:
    return swiglu_work(math.prod(x[:-1]), x[-1] // 2, element_size=0)


def _keep(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, dy: Tensor) -> Tensor:
    return _SWIGLU_BACKWARD(*ctx.saved_tensors, dy)


_SWIGLU = define("swiglu(Tensor x) -> Tensor", _run, _fake, lambda x: _work(x).forward.flops)
_SWIGLU_BACKWARD = define(
    "swiglu_backward(Tensor x, Tensor dy) -> Tensor",
    _run_backward,
    _fake_backward,
    lambda x, dy: _work(x).backward.flops,
)
differentiate(_SWIGLU, _keep, _differentiate, _SWIGLU_BACKWARD)


BACKEND = Backend(
    name="triton",
    load=_load,
    devices=CUDA_ONLY,
    dtypes=FLOAT_DTYPES,
    features=frozenset(),
    package="triton",
)
