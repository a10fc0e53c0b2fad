"""Lets megatron-core run on a machine without a GPU, with gloo in NCCL's place.

megatron-core 0.19.2 asks for ``torch.cuda.current_device()`` and ``device="cuda"`` on paths that
every training step takes (gradient buffers, pipeline schedules, gradient clipping). On a machine
without CUDA this module answers those questions with the CPU; on a machine with CUDA
:func:`install` does nothing. It must run before megatron is imported.

Only the calls that megatron makes are replaced, each by its nearest meaning on a CPU: a device
named "cuda" is the CPU, streams and synchronisation are no-ops, CUDA's random generator is the
CPU's. The factories are wrapped one by one (instead of a torch function mode) because a mode
would tax every operation of the scan's inner loop.
"""

import functools
import importlib
import logging
import os
import sys
from contextlib import nullcontext
from typing import Any

import torch

_FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "linspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "randperm",
    "tensor",
    "zeros",
    "zeros_like",
)
_CPU = torch.device("cpu")
_installed = False


def is_installed() -> bool:
    """Whether this process runs megatron on the CPU through the shim."""
    return _installed


def install() -> bool:
    """Installs the shim if this machine has no CUDA device; returns whether it is in place."""
    global _installed
    if _installed or torch.cuda.is_available():
        return _installed
    # megatron decorates its fusions with torch.compile at import; Dynamo refuses replaced torch
    # functions, and eager is what a CPU run wants anyway.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    importlib.import_module("torch._dynamo")

    _installed = True
    for package in ("transformer_engine", "apex"):
        # Installed or not, they cannot run here, and megatron prefers them: hide them from it.
        sys.modules[package] = None  # type: ignore[assignment]
    _replace_factories()
    _replace_tensor_methods()
    _replace_cuda_calls()
    _replace_rng_setter()
    return True


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _replace_factories() -> None:
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Any) -> Any:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return wrapped


def _replace_tensor_methods() -> None:
    to, as_type = torch.Tensor.to, torch.Tensor.type

    def to_cpu(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        args = tuple(_CPU if _is_cuda(a) else a for a in args)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return to(self, *args, **kwargs)

    def cuda_type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = as_type(self, *args, **kwargs)
        # The optimizers compare the name of a parameter's type with "torch.cuda.…".
        if isinstance(result, str) and not result.startswith("torch.cuda."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    def stay(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    replaced: Any = torch.Tensor
    replaced.to, replaced.type = to_cpu, cuda_type_name
    replaced.cuda = replaced.pin_memory = stay


class _NoStream:
    """Stands for a CUDA stream or event: on a CPU everything is already done."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = _CPU

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def _replace_cuda_calls() -> None:
    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def cpu_rng_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_cpu_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    def seed_cpu(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.device_count = lambda: 1
    cuda.synchronize = cuda.empty_cache = cuda.set_device = nothing
    cuda.current_stream = cuda.default_stream = cuda.Stream = cuda.Event = _NoStream
    cuda.stream = nullcontext
    cuda.manual_seed = seed_cpu
    cuda.manual_seed_all = nothing  # torch.manual_seed calls it
    cuda.get_rng_state = cuda.random.get_rng_state = cpu_rng_state
    cuda.set_rng_state = cuda.random.set_rng_state = set_cpu_rng_state
    cuda.nvtx.range_push = cuda.nvtx.range_pop = nothing


def _replace_rng_setter() -> None:
    """megatron's own setter writes into CUDA generators; here there is only the CPU's."""
    import megatron.core.tensor_parallel.random as megatron_random

    def set_rng_state(new_state: torch.Tensor, device: int = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    megatron_random._set_cuda_rng_state = set_rng_state
    # It warns whenever the CPU generator moves while "CUDA's" is forked: here they are one.
    logging.getLogger(megatron_random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )
