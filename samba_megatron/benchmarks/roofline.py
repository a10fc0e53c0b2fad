"""The shortest time in which a device could do what an operation must do.

Whatever takes longest of moving the bytes, the matrix products, the other operations and the
exponentials bounds a pass: they overlap at best entirely.
"""

from dataclasses import dataclass

from samba_megatron.ops.cost import Passes, Work
from samba_megatron.platform.hardware import gpu_in


@dataclass(frozen=True)
class Peaks:
    """Rates of a device, a second; None: not known, and then not a bound."""

    bytes: float
    products: float
    flops: float | None = None
    exponentials: float | None = None
    source: str = ""


def stated_peaks(device_name: str, dtype: str) -> Peaks | None:
    """What a GPU's maker states; None for a device that the table does not have.

    Args:
        device_name: as torch.cuda.get_device_name() says it.
        dtype: ``bf16`` or ``fp32``, of the activations.
    """
    gpu = gpu_in(device_name)
    if gpu is None:
        return None
    return Peaks(
        gpu.bandwidth * 1e12,
        gpu.tflops[dtype] * 1e12,
        gpu.tflops["fp32"] * 1e12,
        gpu.exponentials * 1e12,
        source="stated",
    )


def measured_peaks(copy_bytes: float, product_flops: float) -> Peaks:
    """Where nothing is stated: what this machine reached in a copy and in a large product."""
    return Peaks(copy_bytes, product_flops, source="measured")


@dataclass(frozen=True)
class Floor:
    """The least time, and what it is for."""

    seconds: float
    bound: str


def floor_of_pass(work: Work, peaks: Peaks) -> Floor:
    """Of one pass."""
    bounds = {
        "bytes": work.bytes / peaks.bytes,
        "products": work.products / peaks.products,
        "flops": work.flops / peaks.flops if peaks.flops else 0.0,
        "exponentials": work.exponentials / peaks.exponentials if peaks.exponentials else 0.0,
    }
    bound = max(bounds, key=lambda name: bounds[name])
    return Floor(bounds[bound], bound)


def floor_of_both(passes: Passes, peaks: Peaks) -> Floor:
    """Forward and then backward: their floors add up. Bounded by what the longer one is."""
    forward, backward = (floor_of_pass(p, peaks) for p in (passes.forward, passes.backward))
    return Floor(
        forward.seconds + backward.seconds,
        max(forward, backward, key=lambda floor: floor.seconds).bound,
    )
