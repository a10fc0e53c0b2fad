"""What the machine is: its node's name, its devices' names and peak rates."""

import os
import socket
from typing import Literal

Precision = Literal["bf16", "fp8", "fp32"]

# Dense peaks in FLOP/s, from NVIDIA's data sheets (SXM form; PCIe cards reach less).
_PEAKS: dict[str, dict[Precision, float]] = {
    "A100": {"bf16": 312e12, "fp32": 19.5e12},
    "H100 PCIe": {"bf16": 756e12, "fp8": 1513e12, "fp32": 51e12},
    "H100": {"bf16": 989e12, "fp8": 1979e12, "fp32": 67e12},
    "H200": {"bf16": 989e12, "fp8": 1979e12, "fp32": 67e12},
    "GH200": {"bf16": 989e12, "fp8": 1979e12, "fp32": 67e12},
    "B200": {"bf16": 2250e12, "fp8": 4500e12, "fp32": 80e12},
    "GB200": {"bf16": 2500e12, "fp8": 5000e12, "fp32": 80e12},
}


def node_name() -> str:
    """This node's name as the scheduler knows it, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Peak dense FLOP/s of a GPU by its name; None where the table has none (CPUs, others).

    Args:
        device_name: as torch.cuda.get_device_name() says it.
        precision: of the matrix products.
    """
    for name in sorted(_PEAKS, key=len, reverse=True):
        if name in device_name:
            return _PEAKS[name].get(precision)
    return None


def device_name() -> str:
    """Name of this process's device, for people and for :func:`peak_flops`."""
    import platform

    import torch

    from samba_megatron.platform import distributed

    if distributed.device_type() == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def peak_memory_gib() -> float:
    """Largest memory this process has held: allocated on the GPU, or resident on a CPU; GiB."""
    import resource

    import torch

    from samba_megatron.platform import distributed

    if distributed.device_type() == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
