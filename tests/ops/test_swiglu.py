"""SwiGLU: the kernel against the formula, on a GPU, and interpreted on a CPU."""

import pytest
import torch
from torch import Tensor

from samba_megatron.ops.swiglu import swiglu, swiglu_reference, triton_swiglu
from samba_megatron.ops.swiglu.dispatch import SWIGLU
from tests.ops.comparing import Kernel, assert_near, run, to
from tests.ops.interpreting import interpret

SHAPES = [(1, 2), (3, 2, 6), (5, 1, 2 * 1024), (2, 3, 2 * 1500)]


def make_input(shape: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) * 4
    x[..., 0] = 90.0  # where exp(-gate) leaves fp32
    x[..., -1] = -90.0
    return {"x": x}


def compare() -> None:
    """Compares the kernels in Triton's interpreter, which runs them on CPU tensors."""
    for shape in SHAPES:
        inputs = make_input(shape)
        got = run(triton_swiglu.swiglu_triton, to(inputs, torch.float32))
        assert_near(got, run(swiglu_reference, inputs), 1e-6)


def check_operators() -> None:
    """Schema, fake tensors and gradients, by torch's own check; and no second derivative.

    For another test's process, which has the compiler already (see test_fused_operator.py).
    """
    x = torch.randn(5, 4, 6, requires_grad=True)
    torch.library.opcheck(torch.ops.samba_megatron.swiglu, (x,))
    dy = torch.randn(5, 4, 3)
    torch.library.opcheck(torch.ops.samba_megatron.swiglu_backward, (x.detach(), dy))
    y = triton_swiglu.swiglu_triton(x.transpose(0, 1))
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        gradient.sum().backward()


def test_the_kernel_is_the_formula() -> None:
    interpret("tests.ops.test_swiglu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.gpu
def test_the_kernel_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    Kernel("triton", "cuda", dtype, 0).require(SWIGLU)
    inputs = {"x": make_input(shape)["x"].to(dtype)}
    expected = run(swiglu_reference, to(inputs, torch.float64))
    got = run(swiglu, to(inputs, "cuda"), backend="triton")
    # One rounding of each result; the cotangent of the run is rounded too.
    assert_near({k: v.cpu() for k, v in got.items()}, expected, 2 * torch.finfo(dtype).eps)


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \[\.\.\., 2F\]"):
        swiglu(torch.zeros(2, 3))
