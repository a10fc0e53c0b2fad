"""How the operations' tests hold a backend against a reference: kernels, runs, comparisons."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from samba_megatron.ops.registry import Operation

Inputs = dict[str, Any]
"""Arguments by name: tensors, or None for an absent one."""


@dataclass(frozen=True)
class Kernel:
    """A backend on a device, in the widest dtype it takes, and how near that must come."""

    backend: str
    device: str
    dtype: torch.dtype
    tolerance: float

    def param(self) -> Any:
        marks = [pytest.mark.gpu] if self.device == "cuda" else []
        return pytest.param(self, marks=marks, id=f"{self.backend}-{self.device}")

    def require(
        self, operation: Operation, features: set[str] | frozenset[str] = frozenset()
    ) -> None:
        """Skips where the package is absent or the kernel does not have the features."""
        backend = operation.backends[self.backend]
        if reason := backend.unavailable():
            pytest.skip(f"{self.backend}: {reason}")
        if missing := features - backend.features:
            pytest.skip(f"{self.backend} does not support {', '.join(sorted(missing))}")


class InTurn:
    """A scan's carry where one process has all stretches of time, and runs them in their order."""

    def __init__(self) -> None:
        self._carried: Tensor | None = None

    def begin(self) -> None:
        """The next stretch is the first, or backward in time the last."""
        self._carried = None

    def __call__(self, decay: Tensor, state: Tensor, backward_in_time: bool) -> Tensor:
        entering = torch.zeros_like(state) if self._carried is None else self._carried
        self._carried = state + decay * entering
        return entering


def in_stretches(
    scan: Callable[..., tuple[Tensor, Tensor | None]], inputs: Inputs, length: int
) -> Tensor:
    """The output of a scan that is carried over stretches of ``length`` positions."""
    carry, parts = InTurn(), []
    for begin in range(0, inputs["u"].shape[0], length):
        own = {
            name: inputs[name][begin : begin + length]
            for name in ("u", "delta", "B", "C", "z", "reset")
            if inputs.get(name) is not None
        }
        parts.append(scan(**inputs | own, carry=carry)[0])
    carry.begin()
    return torch.cat(parts)


def run(
    function: Callable[..., Any], inputs: Inputs, cotangent_seed: int = 7, **options: Any
) -> dict[str, Tensor]:
    """Outputs ("out0", …) and gradients ("d" + input) of a random linear form of the outputs.

    Every floating input is differentiated. The form's weights depend on the outputs' shapes only.
    """
    leaves = {
        name: tensor.detach().requires_grad_(tensor.is_floating_point())
        for name, tensor in inputs.items()
        if tensor is not None
    }
    outputs = function(**leaves, **options)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
    generator = torch.Generator().manual_seed(cotangent_seed)
    cotangents = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs
    ]
    floating = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    gradients = torch.autograd.grad(outputs, list(floating.values()), cotangents)
    results = {f"out{i}": y.detach() for i, y in enumerate(outputs)}
    return results | {f"d{name}": g for name, g in zip(floating, gradients, strict=True)}


def assert_near(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    tolerance: float,
    least_scale: float = 0.0,
) -> None:
    """Every tensor within `tolerance` of the largest magnitude of its expected values.

    `least_scale` is that magnitude for values that cancel to zero.
    """
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name].to(want)
        assert got.shape == want.shape, name
        assert torch.isfinite(got).all(), name
        if want.numel() == 0:
            continue
        scale = max(want.abs().max().item(), least_scale)
        worst = (got - want).abs().max().item()
        assert worst <= tolerance * scale, f"{name}: off by {worst:.2e} at a scale of {scale:.2e}"


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Every tensor equal, bit for bit."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        assert torch.equal(actual[name], want), name


def to(inputs: Inputs, *args: Any) -> Inputs:
    """Floating inputs moved to a dtype or device; others to the device only."""
    moved: Inputs = {}
    for name, tensor in inputs.items():
        if tensor is None or tensor.is_floating_point():
            moved[name] = None if tensor is None else tensor.to(*args)
        else:
            moved[name] = tensor.to(*(a for a in args if not isinstance(a, torch.dtype)))
    return moved
