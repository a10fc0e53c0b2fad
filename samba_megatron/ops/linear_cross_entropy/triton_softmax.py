"""Backend "triton": the chunked head and loss with a softmax that moves 6 bytes a bf16 logit.

One kernel reads a chunk's logits and keeps three numbers a token in fp32; after these are joined
over the ranks that share the vocabulary, a second one writes the gradient over the logits. Nothing
of the logits' size is made in fp32.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from samba_megatron.ops.linear_cross_entropy.chunked import Softmax, chunked
from samba_megatron.ops.registry import CUDA_ONLY, FLOAT_DTYPES, Backend

BLOCK = 4096
"""Columns that a program has at once: 16 a thread."""
WARPS = 8


def make_kernels() -> tuple[Any, Any]:
    """The kernels of the statistics and of the gradient.

    They are made when they are first needed, because a machine without a GPU may lack Triton.
    """
    import triton
    import triton.language as tl

    @triton.jit
    def cross_entropy_statistics(  # type: ignore[no-untyped-def]
        logits, target, result, tokens, width, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        largest, total = -float("inf"), 0.0
        for number in range(BLOCKS):
            column = number * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(logits + row * width + column, column < width, other=-float("inf"))
            x = x.to(tl.float32)
            before = largest
            largest = tl.maximum(before, tl.max(x, 0))
            total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), 0)
        own = tl.load(target + row)
        inside = (own >= 0) & (own < width)
        picked = tl.load(logits + row * width + own, inside, other=0.0).to(tl.float32)
        tl.store(result + row, largest)
        tl.store(result + tokens + row, total)
        tl.store(result + 2 * tokens + row, picked)

    @triton.jit
    def cross_entropy_gradient(  # type: ignore[no-untyped-def]
        logits, target, normalizer, weights, width, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        x = tl.load(logits + row * width + column, inside, other=0.0).to(tl.float32)
        share = tl.exp(x - tl.load(normalizer + row))
        own = tl.where(column == tl.load(target + row), 1.0, 0.0)
        gradient = (share - own) * tl.load(weights + row)
        tl.store(logits + row * width + column, gradient.to(logits.dtype.element_ty), inside)

    return cross_entropy_statistics, cross_entropy_gradient


def make_softmax(kernels: tuple[Any, Any]) -> Softmax:
    """The two passes; logits must be contiguous."""

    def statistics(logits: Tensor, target: Tensor) -> Tensor:
        tokens, width = logits.shape
        result = logits.new_empty(3, tokens, dtype=torch.float32)
        blocks = -(-width // BLOCK)
        kernels[0][(tokens,)](logits, target, result, tokens, width, BLOCK, blocks, num_warps=WARPS)
        return result

    def to_gradient(logits: Tensor, target: Tensor, normalizer: Tensor, weights: Tensor) -> None:
        tokens, width = logits.shape
        grid = (tokens, -(-width // BLOCK))
        kernels[1][grid](logits, target, normalizer, weights, width, BLOCK, num_warps=WARPS)

    return Softmax(statistics, to_gradient)


def _load() -> Callable[..., tuple[Tensor, Tensor]]:
    return chunked(make_softmax(make_kernels()))


BACKEND = Backend(
    name="triton",
    load=_load,
    devices=CUDA_ONLY,
    dtypes=FLOAT_DTYPES,
    features=frozenset({"vocabulary_parallel", "main_grad"}),
    package="triton",
)
