"""Loads compiled kernels onto a GPU and launches them, through the driver's own library."""

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from samba_megatron.ops.selective_scan.fused.compiler import (
    compiled,
    knows_architecture,
    nvrtc_version,
)
from samba_megatron.ops.selective_scan.fused.layout import SMALLEST_CHUNK, THREADS, Variant
from samba_megatron.ops.selective_scan.fused.source import kernel_source

_DYNAMIC_SHARED_BYTES, _SHARED_CARVEOUT = 8, 9
"""The driver's numbers for attributes of a function: the most shared memory that a block may ask
for, and the share in percent of a multiprocessor's fast memory that shared memory gets."""
_MUCH_SHARED = 48 * 1024
_MOST_SHARED_BYTES = 97
"""Its number for the shared memory that a block can have, an attribute of the device."""
OLDEST_MAJOR = 8
"""Compute capability from which on there are instructions for bf16."""


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def require_support() -> None:
    """Raises OSError or RuntimeError, with the reason, where the GPU cannot have the kernels."""
    _driver()
    major, minor = torch.cuda.get_device_capability()
    if major < OLDEST_MAJOR:
        raise RuntimeError(f"a GPU of compute capability {major}.{minor} is too old for it")
    if not knows_architecture(10 * major + minor):
        raise RuntimeError(f"NVRTC {nvrtc_version()} does not know this GPU, sm_{major}{minor}")


def _check(result: int, what: str) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        reason = text.value.decode() if text.value else f"error {result}"
        raise RuntimeError(f"{what} failed: {reason}")


class DeviceKernels:
    """The kernels of one variant on one GPU."""

    def __init__(self, variant: Variant, device: int) -> None:
        """Compiles them unless that has been done before, and loads them.

        Raises:
            OSError, RuntimeError: there is no compiler or driver, or it refused.
        """
        major, minor = torch.cuda.get_device_capability(device)
        options = [f"--gpu-architecture=sm_{major}{minor}", *variant.options()]
        code = compiled(kernel_source(), options, f"the selective scan's kernels for {variant}")
        self.variant, self.device = variant, device
        self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self._module = ctypes.c_void_p()
        with torch.cuda.device(device):
            _enter_context(device)
            result = _driver().cuModuleLoadData(ctypes.byref(self._module), code)
        _check(result, "loading the selective scan's kernels")
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._workers: dict[str, int] = {}

    def workers(self, kernel: str) -> int:
        """Blocks of `kernel` that the GPU holds at once."""
        if kernel not in self._workers:
            # Autograd's threads come without a context.
            _enter_context(self.device)
            blocks = ctypes.c_int()
            result = _driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(
                ctypes.byref(blocks),
                self._function(kernel),
                THREADS,
                ctypes.c_size_t(self.variant.shared_bytes(kernel)),
            )
            _check(result, f"asking for {kernel}'s occupancy")
            self._workers[kernel] = max(1, min(2, blocks.value)) * self._multiprocessors
        return self._workers[kernel]

    def launch(self, kernel: str, blocks: int, arguments: ctypes.Structure) -> None:
        """Queues `kernel` on the current stream of the current device, which must be this one."""
        _enter_context(self.device)
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = torch.cuda.current_stream(self.device).cuda_stream
        sizes: Sequence[int] = (blocks, 1, 1, THREADS, 1, 1, self.variant.shared_bytes(kernel))
        result = _driver().cuLaunchKernel(
            self._function(kernel), *sizes, ctypes.c_void_p(stream), parameters, None
        )
        _check(result, f"launching {kernel}")

    def _function(self, kernel: str) -> ctypes.c_void_p:
        if kernel not in self._functions:
            function = ctypes.c_void_p()
            result = _driver().cuModuleGetFunction(
                ctypes.byref(function), self._module, kernel.encode()
            )
            _check(result, f"finding {kernel}")
            size = self.variant.shared_bytes(kernel)
            attributes = {_DYNAMIC_SHARED_BYTES: size}
            if size > _MUCH_SHARED:
                attributes[_SHARED_CARVEOUT] = 100
            for attribute, value in attributes.items():
                result = _driver().cuFuncSetAttribute(function, attribute, value)
                _check(result, f"giving {kernel} {size} bytes of shared memory")
            self._functions[kernel] = function
        return self._functions[kernel]


def _enter_context(device: int) -> None:
    """Makes torch's context of `device` this thread's, where none is yet."""
    context = ctypes.c_void_p()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(context)), "asking for the CUDA context")
    if context.value is None:
        _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "CUDA's context")
        _check(_driver().cuCtxSetCurrent(context), "entering the CUDA context")


@cache
def device_kernels(
    element: int, states: int, gated: bool, softplus: bool, device: int
) -> DeviceKernels:
    """The kernels for such calls, with the largest chunk that the GPU's shared memory holds."""
    limit = ctypes.c_int()
    result = _driver().cuDeviceGetAttribute(ctypes.byref(limit), _MOST_SHARED_BYTES, device)
    _check(result, "asking for the GPU's shared memory")
    variant = Variant(element, states, gated, softplus)
    if variant.shared_bytes("scan_backward") > limit.value:
        variant = replace(variant, chunk=SMALLEST_CHUNK)
    return DeviceKernels(variant, device)
