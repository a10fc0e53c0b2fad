"""Measures the selective scan's kernels beside one another; the work of tools/benchmark_scan.py."""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from samba_megatron.ops.selective_scan import fused, mamba_ssm, torch_scan
from samba_megatron.platform.errors import UserError

Call = Callable[[], Tensor]
Inputs = dict[str, Any]
"""A kernel's tensors by their names."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GPU_SHAPES = ("4608x8x4096", "3072x8x4096", "4608x1x32768", "4608x1x4096")
CPU_SHAPES = ("64x2x128",)


def run_benchmark(args: argparse.Namespace) -> None:
    """Measures every kernel at every shape, prints the table and writes the JSON."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for shape in args.shapes or (GPU_SHAPES if device == "cuda" else CPU_SHAPES):
        for kernel in args.kernels:
            rows += measure(kernel, shape, args, device)
    print(table(rows))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        report = {"device": device_name(device), "torch": torch.__version__, "rows": rows}
        (args.output / "scan.json").write_text(json.dumps(report, indent=1))


def measure(kernel: str, shape: str, args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """The kernel's rows of the table at one shape; a row without times if it cannot run here."""
    backend = {"fused": fused.BACKEND, "torch": torch_scan.BACKEND}.get(kernel, mamba_ssm.BACKEND)
    reason = backend.unavailable()
    if reason is None and device == "cpu" and "cpu" not in backend.devices:
        reason = "there is no CUDA device"
    if reason:
        return [{"shape": shape, "kernel": kernel, "skipped": reason}]
    print(f"{kernel} at {shape} …", file=sys.stderr, flush=True)
    inputs = make_inputs(shape, args.states, DTYPES[args.dtype], device)
    call, leaves = CALLS[kernel](inputs)
    weights = torch.randn_like(call())

    def differentiate(y: Tensor) -> None:
        torch.autograd.grad(y, list(leaves.values()), weights)

    forward = median_ms(call, lambda y: None, args.repeats, device)
    both = median_ms(call, differentiate, args.repeats, device)
    row = row_of(shape, kernel, inputs, forward, both)
    if args.parts and device == "cuda":
        row["parts"] = parts_ms(lambda: differentiate(call()))
        print_parts(kernel, shape, row["parts"])
    return [row]


def make_inputs(shape: str, states: int, dtype: torch.dtype, device: str) -> Inputs:
    """A mixer's arguments: u and z halves of one tensor, B and C parts of another."""
    try:
        channels, batch, length = (int(word) for word in shape.split("x"))
    except ValueError:
        raise UserError(
            f"shape {shape!r} is not d_inner x batch x length, as 4608x8x4096"
        ) from None
    like: dict[str, Any] = {"device": device, "dtype": dtype}
    xz = torch.randn(length, batch, 2 * channels, **like)
    projected = torch.randn(length, batch, 160 + 2 * states, **like)
    u, z = xz.chunk(2, -1)
    _, B, C = projected.split([160, states, states], -1)
    inputs = {
        "u": u,
        "delta": torch.randn(length, batch, channels, **like),
        "A": -torch.arange(1, states + 1, device=device).float().expand(channels, -1).contiguous(),
        "B": B,
        "C": C,
        "D": torch.ones(channels, device=device),
        "z": z,
        "delta_bias": torch.rand(channels, device=device) * 4.6 - 6.9,  # steps of 0.001 to 0.1
    }
    return {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}


def _fused(inputs: Inputs) -> tuple[Call, Inputs]:
    return lambda: fused.selective_scan_fused(**inputs)[0], inputs


def _torch(inputs: Inputs) -> tuple[Call, Inputs]:
    return lambda: torch_scan.selective_scan_torch(**inputs)[0], inputs


def _mamba_ssm_with_copies(inputs: Inputs) -> tuple[Call, Inputs]:
    return lambda: mamba_ssm.BACKEND.run(**inputs)[0], inputs


def _mamba_ssm(inputs: Inputs) -> tuple[Call, Inputs]:
    """The published kernel alone, its inputs laid out [batch, channel, time] beforehand."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    laid_out = {
        name: tensor.detach().permute(1, 2, 0).contiguous().requires_grad_()
        if tensor.dim() == 3
        else tensor
        for name, tensor in inputs.items()
    }
    return lambda: selective_scan_fn(**laid_out, delta_softplus=True), laid_out


CALLS: dict[str, Callable[[Inputs], tuple[Call, Inputs]]] = {
    "fused": _fused,
    "mamba_ssm": _mamba_ssm,
    "mamba_ssm with copies": _mamba_ssm_with_copies,
    "torch": _torch,
}


def median_ms(call: Call, finish: Callable[[Tensor], None], repeats: int, device: str) -> float:
    """Median milliseconds of a call and what `finish` does with its result, after three others."""
    times = []
    for _ in range(repeats + 3):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            finish(call())
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            finish(call())
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def row_of(
    shape: str, kernel: str, inputs: Inputs, forward_ms: float, both_ms: float
) -> dict[str, Any]:
    """Times in µs per 1000 tokens, and the bytes that had to be moved in them."""
    u, B = inputs["u"], inputs["B"]
    tokens = u.shape[0] * u.shape[1]
    wide, narrow = u.shape[2] * u.element_size(), B.shape[2] * B.element_size()
    forward_bytes = tokens * (4 * wide + 2 * narrow)
    backward_bytes = tokens * (7 * wide + 4 * narrow)
    per_1000 = 1e6 / tokens
    return {
        "shape": shape,
        "kernel": kernel,
        "dtype": str(u.dtype).removeprefix("torch."),
        "forward_us": round(forward_ms * per_1000, 2),
        "both_us": round(both_ms * per_1000, 2),
        "backward_us": round((both_ms - forward_ms) * per_1000, 2),
        "forward_gb_per_s": round(forward_bytes / forward_ms / 1e6, 1),
        "both_gb_per_s": round((forward_bytes + backward_bytes) / both_ms / 1e6, 1),
    }


def parts_ms(step: Callable[[], None], steps: int = 5) -> dict[str, float]:
    """Milliseconds that each CUDA kernel takes in one step, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total for event in recorded.key_averages()}
    longest = sorted(times.items(), key=lambda item: -item[1])
    return {name[:90]: round(us / 1e3 / steps, 4) for name, us in longest if us > 0}


def print_parts(kernel: str, shape: str, parts: dict[str, float]) -> None:
    """The ten longest parts."""
    print(f"{kernel} at {shape}, forward and backward, ms:")
    for name, ms in list(parts.items())[:10]:
        print(f"  {ms:9.4f}  {name}")


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in aligned columns, µs per 1000 tokens."""
    line = "{:14} {:22} {:>9} {:>9} {:>12} {:>13} {:>10}"
    lines = [
        line.format(
            "shape", "kernel", "forward", "backward", "fwd+bwd", "forward GB/s", "both GB/s"
        )
    ]
    for row in rows:
        if "skipped" in row:
            lines.append(f"{row['shape']:14} {row['kernel']:22} not run: {row['skipped']}")
            continue
        names = ("forward_us", "backward_us", "both_us", "forward_gb_per_s", "both_gb_per_s")
        lines.append(line.format(row["shape"], row["kernel"], *(row[name] for name in names)))
    return "\n".join([*lines, "times in µs per 1000 tokens, medians"])


def device_name(device: str) -> str:
    """The GPU's name, or "cpu"."""
    return torch.cuda.get_device_name() if device == "cuda" else device
