"""What the fused scan's tests give it, on a CPU and on a GPU, and what they expect."""

from typing import Any

import torch
from torch import Tensor

from samba_megatron.ops.selective_scan.reference import selective_scan_reference
from samba_megatron.ops.selective_scan.torch_scan import selective_scan_torch
from tests.ops.comparing import Inputs, assert_near, run, to

FP32 = 5e-6
"""Of the largest value. An exponential's own error is 2e-7, and sums over time add up."""
HALF = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""One rounding of the largest value."""
ACTIVATIONS = ("out0", "du", "ddelta", "dB", "dC", "dz")
OPTIONAL = ("D", "z", "delta_bias", "initial_state", "reset")


def make_inputs(
    length: int, batch: int, channels: int, states: int = 16, seed: int = 0, resets: float = 0.0
) -> Inputs:
    """Every argument in fp64, of the magnitudes that Mamba has."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "u": normal(length, batch, channels),
        "delta": normal(length, batch, channels),
        "A": -torch.exp(normal(channels, states)),
        "B": normal(length, batch, states),
        "C": normal(length, batch, states),
        "D": normal(channels),
        "z": normal(length, batch, channels),
        "delta_bias": normal(channels) - 2,
        "initial_state": normal(batch, channels, states),
        "reset": torch.rand(length, batch, generator=generator) < resets if resets else None,
    }


def expected_of(inputs: Inputs, delta_softplus: bool = True, quick: bool = False) -> Any:
    """Outputs and gradients in fp64 of the inputs as they are, rounded or not.

    The outputs take the kernels' dtypes at last, so that the gradients that come in do too.
    """
    scan = selective_scan_torch if quick else selective_scan_reference

    def rounded(**given: Any) -> tuple[Tensor, Tensor]:
        y, state = scan(**given, delta_softplus=delta_softplus)
        return y.to(inputs["u"].dtype), state.float()

    return run(rounded, to(inputs, torch.float64))


def assert_rounded_once(
    actual: dict[str, Tensor], expected: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Activations and their gradients to their dtype's rounding, what is fp32 to fp32's."""
    for names, tolerance in (
        ([name for name in expected if name in ACTIVATIONS], HALF[dtype]),
        ([name for name in expected if name not in ACTIVATIONS], FP32),
    ):
        assert_near({n: actual[n] for n in names}, {n: expected[n] for n in names}, tolerance)


def in_half(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Activations in half precision, parameters and states in fp32."""
    halves = ("u", "delta", "B", "C", "z")
    return {
        name: to({name: tensor}, dtype if name in halves else torch.float32)[name]
        for name, tensor in inputs.items()
    }


def strided(
    dtype: torch.dtype, device: str, length: int, batch: int, channels: int, seed: int = 3
) -> Inputs:
    """u and z as halves of one tensor, B and C as parts of another, as the mixer has them."""
    inputs = to(in_half(make_inputs(length, batch, channels, seed=seed), dtype), device)
    inputs["u"], inputs["z"] = torch.cat([inputs["u"], inputs["z"]], -1).chunk(2, -1)
    low_rank = torch.zeros(length, batch, 9, dtype=dtype, device=device)
    projected = torch.cat([low_rank, inputs["B"], inputs["C"]], -1)
    _, inputs["B"], inputs["C"] = projected.split([9, 16, 16], -1)
    assert not inputs["u"].is_contiguous() and not inputs["C"].is_contiguous()
    return inputs


def extreme(inputs: Inputs, step: float, rate: float) -> Inputs:
    """Steps up to `step` and rates down to -`rate`, with ordinary ones among them."""
    inputs |= {"initial_state": None, "delta_bias": None}
    inputs["delta"] = inputs["delta"].abs() * step
    inputs["delta"][::5] = 0.01
    inputs["A"][::2] = -rate
    return inputs
