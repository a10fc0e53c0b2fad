"""The causal convolution written out: what every other backend is held against."""

import torch
from torch import Tensor
from torch.nn import functional as F

from samba_megatron.ops.precision import accumulation_dtype
from samba_megatron.ops.registry import ALL_DTYPES, CPU_AND_CUDA, Backend


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution over time, then bias and SiLU, one position after another.

    Args:
        x: input [L, b, E].
        weight: [E, w]; the last column meets the current position.
        bias: [E].
        initial_state: the w - 1 positions before the first, [w - 1, b, E]; zeros when absent.
        reset: bool [L, b], True where a document starts: positions before it count as zero.

    Returns:
        [L, b, E] in x's dtype.
    """
    dtype = accumulation_dtype(x, weight, bias, initial_state)
    width = weight.shape[1]
    kernel = weight.to(dtype).t()
    window = x.new_zeros((width - 1, *x.shape[1:]), dtype=dtype)
    if initial_state is not None:
        window = initial_state.to(dtype)

    outputs = []
    for t in range(x.shape[0]):
        if reset is not None:
            window = window.masked_fill(reset[t, :, None], 0.0)
        window = torch.cat([window, x[t : t + 1].to(dtype)])
        outputs.append((window * kernel[:, None, :]).sum(dim=0))
        window = window[1:]

    y = torch.stack(outputs)
    return F.silu(y if bias is None else y + bias.to(dtype)).to(x.dtype)


BACKEND = Backend(
    name="reference",
    load=lambda: causal_conv1d_reference,
    devices=CPU_AND_CUDA,
    dtypes=ALL_DTYPES,
    features=frozenset({"initial_state", "reset"}),
)
