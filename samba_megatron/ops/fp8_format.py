"""What an FP8 number format makes of a tensor: how much is lost to zero, and how much is clipped.

The formats are those of arXiv 2209.05433. A tensor is multiplied by a scale before it is cast, one
for all of it or one a block; these functions count without casting, so they need no GPU.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scaling = Literal["tensor", "block_128", "square_128", "block_32"]
"""What shares a scale: everything; 128 numbers of a row; 128 x 128 numbers; 32 numbers of a row."""


@dataclass(frozen=True)
class Format:
    """An FP8 format."""

    largest: float
    """The largest finite number."""
    cut: float
    """Numbers over this are cut off to the largest; up to it they round to it."""
    smallest: float
    """The smallest positive number (subnormal)."""


E4M3 = Format(448.0, 464.0, 2.0**-9)
E5M2 = Format(57344.0, 61440.0, 2.0**-16)


def own_scale(x: Tensor, number_format: Format, scaling: Scaling) -> Tensor:
    """The scale that brings the largest number of each block to the format's largest.

    A scale of blocks is a power of two, as Transformer Engine takes it.

    Args:
        x: [rows, columns].
        number_format: of the cast.
        scaling: what shares a scale. A last block may be short.

    Returns:
        What ``x`` is multiplied by: a scalar, or [rows, columns]. 1 where all is zero.
    """
    if scaling == "tensor":
        return _to_largest(torch.linalg.vector_norm(x, torch.inf), number_format)
    width = 32 if scaling == "block_32" else 128
    height = 128 if scaling == "square_128" else 1
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.abs(), (0, -columns % width, 0, -rows % height))
    blocks = padded.unflatten(0, (-1, height)).unflatten(2, (-1, width)).amax(dim=(1, 3))
    scale = torch.exp2(_to_largest(blocks, number_format).log2().floor())
    whole = scale.repeat_interleave(height, 0).repeat_interleave(width, 1)
    return whole[:rows, :columns]


def _to_largest(amax: Tensor, number_format: Format) -> Tensor:
    amax = amax.float()
    return torch.where(amax > 0, number_format.largest / amax, 1.0)


def lost_and_clipped(x: Tensor, scale: Tensor, number_format: Format) -> Tensor:
    """How the cast of ``x * scale`` treats the numbers that are not zero.

    Args:
        x: any shape.
        scale: broadcast to it.
        number_format: of the cast.

    Returns:
        fp64 [3] on x's device: how many are not zero; of these, how many become zero; how many are
        beyond the largest and are clipped to it.
    """
    size = (x.float() * scale).abs()
    not_zero = x != 0
    lost = not_zero & (size <= number_format.smallest / 2)
    return torch.stack([each.sum() for each in (not_zero, lost, size > number_format.cut)]).double()
