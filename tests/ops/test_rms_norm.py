"""RMSNorm: the kernel against the formula, with and without a residual stream beside it."""

import pytest
import torch
from torch import Tensor

from samba_megatron.ops.rms_norm import rms_norm, rms_norm_reference, triton_rms_norm
from samba_megatron.ops.rms_norm.dispatch import RMS_NORM
from tests.ops.comparing import Kernel, assert_near, run, to
from tests.ops.interpreting import interpret

SHAPES = [(1, 3), (3, 2, 96), (9, 1, 128), (5, 2, 1000)]
EPS = 1e-5


def make_inputs(shape: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(shape) + shape[-1])
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    x[0] *= 1e3
    x[-1] *= 1e-3  # where eps counts
    return {"x": x, "weight": torch.rand(shape[-1], generator=generator, dtype=torch.float64) + 0.5}


def layer(function):
    """A residual branch: both results are read, or the first alone."""

    def both(x: Tensor, weight: Tensor) -> Tensor:
        normalised, residual = function(x, weight, EPS)
        return residual * 0.5 + normalised.sin()

    def alone(x: Tensor, weight: Tensor) -> Tensor:
        return function(x, weight, EPS)[0]

    return both, alone


def compare() -> None:
    """Compares the kernels in Triton's interpreter, which runs them on CPU tensors."""
    kernels = triton_rms_norm.make_kernels()

    def kernel(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return triton_rms_norm.RMSNormAndResidual.apply(x, weight, eps, kernels)

    for shape in SHAPES:
        inputs = make_inputs(shape)
        for ours, theirs in zip(layer(kernel), layer(rms_norm_reference), strict=True):
            assert_near(run(ours, to(inputs, torch.float32)), run(theirs, inputs), 2e-6)


def test_the_kernel_is_the_formula() -> None:
    interpret("tests.ops.test_rms_norm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 2, 2304)])
@pytest.mark.gpu
def test_the_kernel_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    Kernel("triton", "cuda", dtype, 0).require(RMS_NORM)
    inputs = to(make_inputs(shape), dtype)

    def kernel(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return rms_norm(x, weight, eps, backend="triton")

    for ours, theirs in zip(layer(kernel), layer(rms_norm_reference), strict=True):
        expected = run(theirs, to(inputs, torch.float64))
        got = run(ours, to(inputs, "cuda"))
        assert_near({k: v.cpu() for k, v in got.items()}, expected, 4 * torch.finfo(dtype).eps)


def test_a_weight_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight must be \[4\], not \[3\]"):
        rms_norm(torch.zeros(2, 4), torch.ones(3), EPS)
