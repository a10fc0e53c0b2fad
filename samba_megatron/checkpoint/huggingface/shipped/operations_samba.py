"""The causal convolution and the selective scan, with given and returned states.

mamba-ssm's and causal-conv1d's kernels where they are installed and apply, else torch.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except ImportError:
    selective_scan_fn = None
try:
    from causal_conv1d import causal_conv1d_fn
except ImportError:
    causal_conv1d_fn = None


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and SiLU.

    Args:
        x: [b, C, L].
        weight: [C, 1, taps].
        bias: [C] or None.
        before: the inputs before x, [b, C, taps - 1]; zeros when None.

    Returns:
        [b, C, L], and the last inputs [b, C, taps - 1] for the next call.
    """
    past = weight.shape[-1] - 1
    if before is None:
        before = x.new_zeros(*x.shape[:2], past)
    whole = torch.cat([before.to(x.dtype), x], dim=-1)
    last = whole[..., whole.shape[-1] - past :]
    if causal_conv1d_fn is not None and x.is_cuda and x.shape[-1] > 1:
        y = causal_conv1d_fn(
            whole,
            weight.squeeze(1).to(x.dtype),
            None if bias is None else bias.to(x.dtype),
            activation="silu",
        )
        return y[..., past:], last
    y = F.conv1d(
        whole, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), groups=x.shape[1]
    )
    return F.silu(y), last


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t and y_t = (C_t · h_t + D u_t) silu(z_t) in fp32.

    Args:
        u: [b, E, L]; delta, z likewise; B, C: [b, N, L]; A: [E, N]; D, delta_bias: [E].
        state: h before the first token [b, E, N]; zeros when None.

    Returns:
        y [b, E, L] in u's dtype, and h after the last token.
    """
    if selective_scan_fn is not None and u.is_cuda and state is None:
        y, last = selective_scan_fn(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus=True, return_last_state=True
        )
        return y, last
    wide = u.float()
    step = F.softplus(delta.float() + delta_bias[:, None])
    source = step * wide
    B, C = B.float(), C.float()
    if state is None:
        state = wide.new_zeros(*u.shape[:2], A.shape[1])
    outputs = []
    for t in range(u.shape[-1]):
        decay = torch.exp(step[:, :, t, None] * A)
        state = decay * state + source[:, :, t, None] * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(-1))
    y = (torch.stack(outputs, dim=-1) + D[:, None] * wide) * F.silu(z.float())
    return y.to(u.dtype), state
