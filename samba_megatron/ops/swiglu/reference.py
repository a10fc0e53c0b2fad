"""SwiGLU written out: what the kernel is held against."""

import torch
from torch import Tensor
from torch.nn import functional as F

from samba_megatron.ops.registry import ALL_DTYPES, CPU_AND_CUDA, Backend


def swiglu_reference(x: Tensor) -> Tensor:
    """silu(gate) · up (arXiv 2002.05202).

    Args:
        x: [..., 2F], gate and up side by side.

    Returns:
        [..., F] in x's dtype.
    """
    gate, up = torch.chunk(x, 2, dim=-1)
    return F.silu(gate) * up


BACKEND = Backend(
    name="torch",
    load=lambda: swiglu_reference,
    devices=CPU_AND_CUDA,
    dtypes=ALL_DTYPES,
    features=frozenset(),
)
