"""SwiGLU's one entrance: checks the call, chooses the kernel, runs it."""

from torch import Tensor

from samba_megatron.ops.registry import AUTO, Operation, Request
from samba_megatron.ops.swiglu import reference, triton_swiglu

SWIGLU = Operation("swiglu", [triton_swiglu.BACKEND, reference.BACKEND])


def swiglu(x: Tensor, backend: str = AUTO) -> Tensor:
    """silu(gate) · up (arXiv 2002.05202).

    Args:
        x: [..., 2F], gate and up side by side.
        backend: a backend's name, or "auto" for the fastest that can run this call.

    Returns:
        [..., F] in x's dtype.

    Raises:
        ValueError: the last dimension is odd.
        UserError: the named backend is unknown or cannot run this call.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x must be [..., 2F], not {list(x.shape)}")
    request = Request(device=x.device.type, dtype=x.dtype)
    return SWIGLU.choose(backend, request).run(x)
