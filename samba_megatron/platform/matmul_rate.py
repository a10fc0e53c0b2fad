"""How fast each device of this node multiplies matrices, and whether it does so repeatably.

A second is enough to find a GPU that is throttled, shares its node with a forgotten program, or
computes wrongly.
"""

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_SECONDS_A_DEVICE = 0.5
_SLOW = 0.85
"""A GPU under this share of its node's median is a slow one."""


def measure() -> tuple[list[dict[str, Any]], list[str]]:
    """(rates, problems): for each GPU, or for the CPU where there is none, ``device`` and
    ``tflops`` of a bf16 (CPU: fp32) product."""
    import torch

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    rates, problems = [], []
    for device in devices or [torch.device("cpu")]:
        try:
            rate, repeatable = _rate(device)
        except RuntimeError as error:
            problems.append(f"{device} cannot multiply matrices: {str(error).splitlines()[0]}")
            continue
        rates.append({"device": str(device), "tflops": round(rate / 1e12, 4)})
        if not repeatable:
            problems.append(f"{device} gave two results for one product of matrices")
    return rates, problems + slow_ones(rates)


def slow_ones(rates: list[dict[str, Any]]) -> list[str]:
    """A sentence for each device that is far slower than its neighbours."""
    if len(rates) < 3:
        return []
    middle = sorted(rate["tflops"] for rate in rates)[len(rates) // 2]
    return [
        f"{rate['device']} reaches {rate['tflops']:.1f} TFLOP/s, its neighbours {middle:.1f}"
        for rate in rates
        if rate["tflops"] < _SLOW * middle
    ]


def too_slow(rates: list[dict[str, Any]], least: float | None) -> list[str]:
    """A sentence for each device that does not reach ``least`` TFLOP/s."""
    return [
        f"{rate['device']} reaches {rate['tflops']:.3g} TFLOP/s, {least:g} are wanted"
        for rate in rates
        if least is not None and rate["tflops"] < least
    ]


def _rate(device: "torch.device") -> tuple[float, bool]:
    """(FLOP/s of the best product, whether all results were the same)."""
    import torch

    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 512
    generator = torch.Generator(device).manual_seed(1)
    factor = torch.randn(size, size, device=device, generator=generator)
    factor = factor.to(torch.bfloat16) if on_gpu else factor
    first = factor @ factor
    best, same, deadline = 0.0, True, time.perf_counter() + _SECONDS_A_DEVICE
    while time.perf_counter() < deadline:
        _wait_for(device)
        start = time.perf_counter()
        result = factor @ factor
        _wait_for(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
        same = same and bool(torch.equal(result, first))
    return best, same


def _wait_for(device: "torch.device") -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
