"""What the trials of kernels measure: the deviation from a reference, and the time.

Inputs have the dtype of training (bf16 on a GPU, fp32 on a CPU) and are the same on every machine.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from samba_megatron.platform.findings import Finding, State

Inputs = dict[str, Tensor]
Function = Callable[..., Any]

_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
"""As in the tests: of the largest value."""
_SECONDS = 0.3
"""How long a kernel is repeated for its time."""


def judge(
    area: str,
    name: str,
    error: float,
    dtype: torch.dtype,
    ms: float,
    tolerance: float = 0.0,
    meaning: str = "",
) -> Finding:
    """A finding of an error and a time; broken where the error is above the tolerance."""
    allowed = tolerance or _TOLERANCE[dtype]
    kind = str(dtype).removeprefix("torch.")
    figures = {"error": error, "milliseconds": round(ms, 4)}
    if error <= allowed:  # False for NaN
        found = f"{kind}: error {error:.1e}, {ms:.2f} ms forward and backward"
        return Finding(area, name, State.OK, found, meaning, figures=figures)
    found = f"{kind}: error {error:.1e}, where {allowed:.0e} is allowed"
    meaning = "it computes wrongly here: force another backend (kernels.… in the recipe)"
    return Finding(area, name, State.BROKEN, found, meaning, "make setup-gpu", figures)


def differentiate(function: Function, inputs: Inputs) -> dict[str, Tensor]:
    """The output, and the gradients by the inputs' names of a fixed linear form of it."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    output = function(**leaves)
    gradients = torch.autograd.grad(output, list(leaves.values()), output_weights(output))
    return {"": output.detach()} | dict(zip(leaves, gradients, strict=True))


def output_weights(output: Tensor) -> Tensor:
    """The gradient that an output is given: normal numbers, representable in bf16."""
    return normal(7, *output.shape).to(torch.bfloat16).to(output)


def largest_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest deviation of any tensor, as a part of its own largest value."""
    errors = [
        ((actual[name].double() - want).abs().max() / want.abs().max()).item()
        for name, want in expected.items()
    ]
    return max(errors, key=lambda error: float("inf") if error != error else error)


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call, after one that warms up."""
    times: list[float] = []
    for _ in range(2):
        call()
    synchronize()
    deadline = time.perf_counter() + _SECONDS
    while not times or time.perf_counter() < deadline:
        start = time.perf_counter()
        call()
        synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def activation(seed: int, *shape: int) -> Tensor:
    """Normal numbers in the dtype of training."""
    return normal(seed, *shape).to(torch.bfloat16 if on_gpu() else torch.float32)


def normal(seed: int, *shape: int) -> Tensor:
    """fp32 on this process's device, the same wherever it is."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device())


def device() -> str:
    """``cuda`` where there is one."""
    return "cuda" if on_gpu() else "cpu"


def on_gpu() -> bool:
    """Whether kernels for a GPU can be tried."""
    return torch.cuda.is_available()


def synchronize() -> None:
    """Waits for the device."""
    if on_gpu():
        torch.cuda.synchronize()
