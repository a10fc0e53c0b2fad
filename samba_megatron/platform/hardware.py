"""What the machine is: its node's name, its devices' names, peak rates and sizes.

The table of GPUs is ``hardware.yaml`` beside this file, the only place that has their figures.
"""

import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from samba_megatron.platform.errors import UserError

Precision = Literal["bf16", "fp8", "fp32"]

_TABLE = Path(__file__).with_name("hardware.yaml")


@dataclass(frozen=True)
class Achieved:
    """Shares of the peaks that training steps reach; ``hardware.yaml`` says what each is."""

    bf16: float
    fp8: float
    half_width: float
    attention: list[float]
    attention_of_documents: list[float]
    memory: float
    passes: float
    scan_step_us: float
    host_layer_ms: float
    host_step_ms: float
    nvlink: float
    network: float


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, in the units of ``hardware.yaml``."""

    name: str
    tflops: dict[str, float]
    memory_gib: float
    bandwidth: float
    nvlink: float
    network: float
    node_gpus: int
    multiprocessors: int
    exponentials: float
    source: str
    achieved: Achieved


@cache
def gpus() -> dict[str, Gpu]:
    """The table, by name."""
    import yaml

    table: dict[str, Any] = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))["gpus"]
    return {
        name: Gpu(name, **{**fields, "achieved": Achieved(**fields["achieved"])})
        for name, fields in table.items()
    }


def gpu_in(device_name: str) -> Gpu | None:
    """The GPU that a device's name contains, as torch.cuda.get_device_name() says it; or None."""
    for name in sorted(gpus(), key=len, reverse=True):
        if name in device_name:
            return gpus()[name]
    return None


def gpu_named(name: str) -> Gpu:
    """The GPU that a person names, in capitals or not.

    Raises:
        UserError: it is not in the table.
    """
    by_name = {known.lower(): gpu for known, gpu in gpus().items()}
    if name.lower() not in by_name:
        raise UserError(f"no figures are known of a GPU {name!r}: known are {', '.join(gpus())}")
    return by_name[name.lower()]


def node_name() -> str:
    """This node's name as the scheduler knows it, else the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Peak dense FLOP/s of a GPU by its name; None where the table has none (CPUs, others).

    Args:
        device_name: as torch.cuda.get_device_name() says it.
        precision: of the matrix products.
    """
    gpu = gpu_in(device_name)
    tflops = gpu.tflops.get(precision) if gpu else None
    return None if tflops is None else tflops * 1e12


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


def reserved_memory_gib() -> float:
    """Largest memory that torch has taken from the GPU, its unused blocks included; GiB. What the
    process has held, on a CPU."""
    import torch

    from samba_megatron.platform import distributed

    if distributed.device_type() == "cuda":
        return torch.cuda.max_memory_reserved() / 2**30
    return peak_memory_gib()
