"""The one rule of which precision the plain-torch kernels compute in."""

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 when any of `tensors` is fp64, fp32 otherwise: half precision is only ever storage."""
    wide = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32
