"""RMSNorm's one entrance: checks the call, chooses the kernel, runs it."""

from torch import Tensor

from samba_megatron.ops.registry import AUTO, Operation, Request
from samba_megatron.ops.rms_norm import reference, triton_rms_norm

RMS_NORM = Operation("rms_norm", [triton_rms_norm.BACKEND, reference.BACKEND])


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str = AUTO) -> tuple[Tensor, Tensor]:
    """x / √(mean(x²) + eps) · weight (arXiv 1910.07467), and x.

    Who reads ``x`` besides should read the second result in its place: the gradient of either way
    is then added in the pass that makes the norm's, not in one of its own.

    Args:
        x: [..., d].
        weight: [d].
        eps: added to the mean square.
        backend: a backend's name, or "auto" for the fastest that can run this call.

    Returns:
        The normalised [..., d] in x's dtype, and x.

    Raises:
        ValueError: the weight is not as long as x is wide.
        UserError: the named backend is unknown or cannot run this call.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be {list(x.shape[-1:])}, not {list(weight.shape)}")
    request = Request(device=x.device.type, dtype=x.dtype, sizes={"row": x.shape[-1]})
    return RMS_NORM.choose(backend, request).run(x, weight, eps)
