"""Backend "triton": RMSNorm, and in one pass over memory its gradient and the residual stream's.

A row is held whole, in fp32 between the load and the store. The backward's programs take rows in
turn and keep what they add to the weight's gradient; their sums are added up at the end, always in
the same order, so the same call gives the same bits.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from samba_megatron.ops.registry import CUDA_ONLY, FLOAT_DTYPES, Backend, Request

WIDEST = 16384
"""Numbers of a row that the registers of a block hold."""
PROGRAMS_A_PROCESSOR = 4
"""Of the backward: enough to hide memory's latency, few enough for their sums to cost nothing."""


def make_kernels() -> tuple[Any, Any]:
    """The forward and the backward kernel.

    They are made when they are first needed, because a machine without a GPU may lack Triton.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def rms_norm_forward(  # type: ignore[no-untyped-def]
        x, weight, y, inverse_rms, width, eps, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < width
        numbers = tl.load(x + row * width + column, inside, other=0.0).to(tl.float32)
        factor = tl.load(weight + column, inside, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(numbers * numbers, 0) / width + eps)
        tl.store(inverse_rms + row, inverse)
        result = numbers * inverse * factor
        tl.store(y + row * width + column, result.to(y.dtype.element_ty), inside)

    @triton.jit
    def rms_norm_backward(  # type: ignore[no-untyped-def]
        x,
        weight,
        inverse_rms,
        dy,
        dresidual,
        dx,
        dweight_parts,
        rows,
        width,
        TURNS: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        program = tl.program_id(0)
        column = tl.arange(0, BLOCK)
        factor = tl.load(weight + column, column < width, other=0.0).to(tl.float32)
        dweight = tl.zeros((BLOCK,), tl.float32)
        for turn in range(TURNS):
            index = turn * tl.num_programs(0) + program
            inside = (column < width) & (index < rows)
            place = index.to(tl.int64) * width + column
            inverse = tl.load(inverse_rms + index, index < rows, other=0.0)
            normalised = tl.load(x + place, inside, other=0.0).to(tl.float32) * inverse
            dout = tl.load(dy + place, inside, other=0.0).to(tl.float32)
            dnormalised = dout * factor
            along = tl.sum(dnormalised * normalised, 0) / width
            gradient = (dnormalised - normalised * along) * inverse
            if HAS_RESIDUAL:
                gradient += tl.load(dresidual + place, inside, other=0.0).to(tl.float32)
            tl.store(dx + place, gradient.to(dx.dtype.element_ty), inside)
            dweight += dout * normalised
        tl.store(dweight_parts + program.to(tl.int64) * width + column, dweight, column < width)

    return rms_norm_forward, rms_norm_backward


def _load() -> Callable[..., tuple[Tensor, Tensor]]:
    kernels = make_kernels()

    def run(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """As :func:`~samba_megatron.ops.rms_norm.reference.rms_norm_reference`."""
        return RMSNormAndResidual.apply(x, weight, eps, kernels)

    return run


def _blocks(width: int) -> dict[str, int]:
    """A row in one block, eight or more numbers a thread."""
    block = max(1 << (width - 1).bit_length(), 128)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


class RMSNormAndResidual(torch.autograd.Function):
    """The two kernels as one differentiable function; keeps its input for the backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, kernels: tuple[Any, Any]
    ) -> tuple[Tensor, Tensor]:
        """[..., d] → normalised [..., d], and x."""
        rows = x.contiguous()
        width = rows.shape[-1]
        y = torch.empty_like(rows)
        inverse_rms = rows.new_empty(rows.numel() // max(width, 1), dtype=torch.float32)
        if rows.numel():
            kernels[0][(inverse_rms.numel(),)](
                rows, weight, y, inverse_rms, width, eps, **_blocks(width)
            )
        ctx.save_for_backward(rows, weight, inverse_rms)
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        return y, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor | None, dresidual: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Of both results → of x and of the weight."""
        if dy is None:
            return dresidual, None, None, None
        x, weight, inverse_rms = ctx.saved_tensors
        dx, (rows, width) = torch.empty_like(x), (inverse_rms.numel(), x.shape[-1])
        programs = min(rows, _programs(x))
        parts = weight.new_zeros((programs, width), dtype=torch.float32)
        if rows:
            ctx.kernels[1][(programs,)](
                x,
                weight,
                inverse_rms,
                dy.contiguous(),
                dx if dresidual is None else dresidual.contiguous(),
                dx,
                parts,
                rows,
                width,
                TURNS=-(-rows // programs),
                HAS_RESIDUAL=dresidual is not None,
                **_blocks(width),
            )
        return dx, parts.sum(0).to(weight.dtype), None, None


def _programs(x: Tensor) -> int:
    if not x.is_cuda:
        return PROGRAMS_A_PROCESSOR
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return processors * PROGRAMS_A_PROCESSOR


def _refuses(request: Request) -> str | None:
    width = request.sizes["row"]
    return None if width <= WIDEST else f"it takes rows up to {WIDEST} numbers, not {width}"


BACKEND = Backend(
    name="triton",
    load=_load,
    devices=CUDA_ONLY,
    dtypes=FLOAT_DTYPES,
    features=frozenset(),
    package="triton",
    refuses=_refuses,
)
