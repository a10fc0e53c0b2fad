"""The causal convolution's backends against its reference, and the reference against conv1d."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from samba_megatron.ops.causal_conv1d import causal_conv1d, causal_conv1d_reference
from samba_megatron.ops.causal_conv1d.dispatch import CAUSAL_CONV1D
from samba_megatron.ops.registry import Request
from samba_megatron.platform.errors import UserError
from tests.ops.comparing import Inputs, Kernel, assert_near, assert_same_bits, run, to

KERNELS = [
    Kernel("torch", "cpu", torch.float64, 1e-13).param(),
    Kernel("torch", "cuda", torch.float64, 1e-13).param(),
    Kernel("causal_conv1d", "cuda", torch.float32, 1e-5).param(),
]


def make_inputs(
    length: int, batch: int = 2, channels: int = 8, width: int = 4, seed: int = 0
) -> Inputs:
    """Every argument of the convolution, in fp64; no document starts."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(length, batch, channels),
        "weight": normal(channels, width),
        "bias": normal(channels),
        "initial_state": normal(width - 1, batch, channels),
        "reset": None,
    }


@pytest.mark.parametrize("width", [1, 2, 4, 5])
@pytest.mark.parametrize("length", [1, 3, 17])
def test_reference_is_a_padded_conv1d(length, width):
    inputs = make_inputs(length, width=width) | {"initial_state": None}

    def padded_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        padded = F.pad(x.permute(1, 2, 0), (width - 1, 0))
        y = F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[2])
        return F.silu(y).permute(2, 0, 1)

    assert_near(run(causal_conv1d_reference, inputs), run(padded_conv1d, inputs), 1e-13)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=40, derandomize=True)
@given(
    length=st.integers(1, 40),
    batch=st.integers(1, 3),
    eights=st.integers(1, 3),
    width=st.integers(1, 5),
    absent=st.sets(st.sampled_from(["bias", "initial_state", "reset"])),
    seed=st.integers(0, 1000),
)
def test_matches_reference(kernel, length, batch, eights, width, absent, seed):
    if kernel.backend == "causal_conv1d":
        width = min(max(width, 2), 4)
        absent = absent | {"initial_state"} if "reset" not in absent else absent
    inputs = make_inputs(length, batch, 8 * eights, width, seed)
    random = torch.Generator().manual_seed(seed)
    inputs["reset"] = torch.rand(length, batch, generator=random) < 0.2
    inputs = to(inputs | dict.fromkeys(absent), kernel.device)
    kernel.require(CAUSAL_CONV1D)
    actual = run(causal_conv1d, to(inputs, kernel.dtype), backend=kernel.backend)
    assert_near(actual, run(causal_conv1d_reference, inputs), kernel.tolerance)


def test_gradcheck():
    inputs = make_inputs(7, channels=3)
    reset = torch.zeros(7, 2, dtype=torch.bool)
    reset[0, 1] = reset[4, 0] = True
    tensors = [inputs[name].requires_grad_() for name in ("x", "weight", "bias", "initial_state")]
    assert torch.autograd.gradcheck(
        lambda x, w, b, i: causal_conv1d(x, w, b, i, reset, backend="torch"), tensors
    )


@pytest.mark.parametrize("start", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_documents_cannot_touch_each_other(start, dtype):
    """Another first document leaves the second's outputs and gradients the same bits, and v.v."""
    inputs = to(make_inputs(20), dtype)
    inputs["reset"] = torch.zeros(20, 2, dtype=torch.bool)
    inputs["reset"][start] = True
    base = run(causal_conv1d, inputs, backend="torch")
    first, second = slice(0, start), slice(start, None)
    for changed, other in ((first, second), (second, first)):
        perturbed = inputs | {"x": inputs["x"].clone()}
        perturbed["x"][changed] *= -3
        result = run(causal_conv1d, perturbed, backend="torch")
        assert not torch.equal(result["out0"][changed], base["out0"][changed])
        for name in ("out0", "dx"):
            assert torch.equal(result[name][other], base[name][other]), name


@pytest.mark.parametrize("cut", [1, 2, 3, 9])
def test_two_calls_equal_one(cut):
    """The second call's initial state is the first's last tokens; a start may lie at the cut."""
    inputs = make_inputs(12)
    inputs["reset"] = torch.zeros(12, 2, dtype=torch.bool)
    inputs["reset"][cut, 0] = inputs["reset"][cut + 1, 1] = True

    def in_two(x: Tensor, initial_state: Tensor, reset: Tensor, **rest: Any) -> Tensor:
        first = causal_conv1d(x[:cut], initial_state=initial_state, reset=reset[:cut], **rest)
        halo = torch.cat([initial_state, x[:cut]])[-3:]
        second = causal_conv1d(x[cut:], initial_state=halo, reset=reset[cut:], **rest)
        return torch.cat([first, second])

    assert_near(run(in_two, inputs), run(causal_conv1d, inputs), 1e-14)


def test_bf16_is_only_storage():
    """bf16 in, bf16 out: the same bits as fp32 arithmetic rounded at the very end."""
    inputs = to(make_inputs(33, channels=16), torch.bfloat16)
    inputs["bias"] = inputs["bias"].float()
    wide = run(lambda **t: causal_conv1d(**t).bfloat16(), to(inputs, torch.float32))
    narrow = run(causal_conv1d, inputs)
    assert narrow["out0"].dtype == torch.bfloat16
    for name in ("x", "weight", "bias", "initial_state"):
        assert narrow[f"d{name}"].dtype == inputs[name].dtype, name
    assert_same_bits(narrow, {name: wide[name].to(narrow[name].dtype) for name in wide})


def test_half_of_a_projection_and_a_conv1d_weight():
    """The mixer's input is half of a wider tensor and its weight has torch's shape [E, 1, w]."""
    inputs = make_inputs(9)
    strided = torch.cat([inputs["x"], inputs["x"]], dim=-1).chunk(2, dim=-1)[0]
    y = causal_conv1d(strided, inputs["weight"].unsqueeze(1), inputs["bias"])
    expected = causal_conv1d_reference(inputs["x"], inputs["weight"], inputs["bias"])
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    assert y.is_contiguous()


@pytest.mark.parametrize(
    ("sizes", "features", "reason"),
    [
        ({"channels": 8, "width": 5}, set(), "2 to 4 wide, not 5"),
        ({"channels": 12, "width": 4}, set(), "multiples of 8, not 12"),
        ({"channels": 8, "width": 4}, {"initial_state", "reset"}, "together with reset"),
        ({"channels": 8, "width": 4, "span": 1 << 32}, {"reset"}, "32 bits, and 4,294,967,296"),
    ],
)
def test_the_package_kernel_names_its_limits(sizes, features, reason):
    request = Request("cuda", torch.bfloat16, frozenset(features), sizes)
    assert reason in (CAUSAL_CONV1D.backends["causal_conv1d"].refuses(request) or "")


def test_forcing_the_package_kernel_on_a_cpu_is_refused_by_name():
    with pytest.raises(UserError, match="'causal_conv1d' cannot run here: it runs on cuda"):
        causal_conv1d(**make_inputs(3), backend="causal_conv1d")


@pytest.mark.parametrize("name", ["weight", "bias", "initial_state"])
def test_shapes_that_do_not_fit_are_named(name):
    inputs = make_inputs(3)
    inputs[name] = inputs[name][:-1]
    with pytest.raises(ValueError, match=f"^{name} must be"):
        causal_conv1d(**inputs)
