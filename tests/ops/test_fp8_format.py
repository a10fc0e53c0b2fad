"""Counting what FP8 loses agrees with torch's own casts."""

import pytest
import torch

from samba_megatron.ops.fp8_format import E4M3, E5M2, Format, Scaling, lost_and_clipped, own_scale

DTYPES = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


def spread(rows: int, columns: int) -> torch.Tensor:
    """Numbers over many orders of magnitude, some of them zero."""
    generator = torch.Generator().manual_seed(rows)
    uniform, sign, kept = (torch.rand(rows, columns, generator=generator) for _ in range(3))
    return torch.exp2(uniform * 35 - 30) * (sign - 0.5).sign() * (kept > 0.1)


@pytest.mark.parametrize("number_format", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("scaling", ["tensor", "block_128", "square_128", "block_32"])
def test_lost_are_those_that_the_cast_makes_zero(number_format: Format, scaling: Scaling) -> None:
    x = spread(200, 300)
    scale = own_scale(x, number_format, scaling)
    found = (x * scale).to(DTYPES[number_format]).float()
    assert found.isfinite().all() and found.abs().max() <= number_format.largest
    count, lost, clipped = lost_and_clipped(x, scale, number_format).tolist()
    assert count == (x != 0).sum()
    assert lost == ((found == 0) & (x != 0)).sum() > 0
    assert clipped == 0


@pytest.mark.parametrize(
    ("scaling", "height", "width"), [("block_32", 1, 32), ("square_128", 128, 128)]
)
def test_each_block_has_its_own_scale(scaling: Scaling, height: int, width: int) -> None:
    """A power of two that brings the block's largest number near the format's largest."""
    x = spread(256, 256)
    scaled = (x * own_scale(x, E4M3, scaling)).abs()
    largest = scaled.unflatten(0, (-1, height)).unflatten(2, (-1, width)).amax(dim=(1, 3))
    assert ((largest > E4M3.largest / 2) & (largest <= E4M3.largest)).all()


@pytest.mark.parametrize("number_format", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_its_own_scale_clips_nothing(number_format: Format) -> None:
    """Not by the rounding of the scale either."""
    for largest in torch.logspace(-8, 8, 500, base=2).bfloat16():
        x = torch.stack([largest, largest / 3]).unsqueeze(0)
        scale = own_scale(x, number_format, "tensor")
        assert lost_and_clipped(x, scale, number_format).tolist() == [2, 0, 0]


def test_a_scale_of_the_past_clips() -> None:
    x = torch.tensor([1.0, -2.0, 4.0, 0.0])
    stale = own_scale(x[:2].unsqueeze(0), E4M3, "tensor")
    assert lost_and_clipped(x, stale, E4M3).tolist() == [3, 0, 1]


def test_nothing_but_zeros() -> None:
    zeros = torch.zeros(4, 64)
    for scaling in ("tensor", "block_32"):
        assert lost_and_clipped(zeros, own_scale(zeros, E4M3, scaling), E4M3).tolist() == [0, 0, 0]
