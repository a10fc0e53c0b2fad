"""SwiGLU: the kernel against the formula, on a GPU, and interpreted on a CPU."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from samba_megatron.ops.swiglu import swiglu, swiglu_reference, triton_swiglu
from samba_megatron.ops.swiglu.dispatch import SWIGLU
from tests.ops.comparing import Kernel, assert_near, run, to

SHAPES = [(1, 2), (3, 2, 6), (5, 1, 2 * 1024), (2, 3, 2 * 1500)]


def make_input(shape: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(*shape, generator=generator, dtype=torch.float64) * 4
    x[..., 0] = 90.0  # where exp(-gate) leaves fp32
    x[..., -1] = -90.0
    return {"x": x}


def interpreted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The kernels in Triton's interpreter, which runs them on CPU tensors."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    kernels = importlib.reload(triton_swiglu).make_kernels()
    return lambda x: triton_swiglu.SwiGLU.apply(x, kernels)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_the_formula(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, kernel = make_input(shape), interpreted(monkeypatch)
    expected = run(swiglu_reference, inputs)
    assert_near(run(kernel, to(inputs, torch.float32)), expected, 1e-6)


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
