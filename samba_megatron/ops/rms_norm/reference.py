"""RMSNorm written out: what the kernel is held against."""

from torch import Tensor
from torch.nn import functional as F

from samba_megatron.ops.registry import ALL_DTYPES, CPU_AND_CUDA, Backend


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / √(mean(x²) + eps) · weight (arXiv 1910.07467), and x.

    Args:
        x: [..., d].
        weight: [d].
        eps: added to the mean square.

    Returns:
        The normalised [..., d] in x's dtype, and x as it is, for the residual stream.
    """
    return F.rms_norm(x, (x.shape[-1],), weight, eps), x


BACKEND = Backend(
    name="torch",
    load=lambda: rms_norm_reference,
    devices=CPU_AND_CUDA,
    dtypes=ALL_DTYPES,
    features=frozenset(),
)
