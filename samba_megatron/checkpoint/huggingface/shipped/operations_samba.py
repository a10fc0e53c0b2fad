"""The causal convolution and the selective scan, with given and returned states; rotary embedding.

mamba-ssm's and causal-conv1d's kernels where they are installed and apply, else torch. Two kinds:
over a whole prompt, and of a single token that goes on from a state.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
except ImportError:
    selective_scan_fn = selective_state_update = None
try:
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
except ImportError:
    causal_conv1d_fn = causal_conv1d_update = None


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and SiLU.

    Args:
        x: [b, C, L].
        weight: [C, 1, taps].
        bias: [C] or None.
        before: the inputs before x, [b, C, taps - 1]; zeros when None. A single token's kernel
            writes the new ones into it.

    Returns:
        [b, C, L], and the last inputs [b, C, taps - 1] for the next call.
    """
    past = weight.shape[-1] - 1
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if causal_conv1d_update is not None and before is not None and _is_next_token(x):
        before = before.to(x.dtype)
        taps = weight.squeeze(1)
        y = causal_conv1d_update(x.squeeze(-1), before, taps, bias, activation="silu")
        return y.unsqueeze(-1), before
    if causal_conv1d_fn is not None and x.is_cuda and before is None and x.shape[-1] > past:
        y = causal_conv1d_fn(x.contiguous(), weight.squeeze(1), bias, activation="silu")
        return y, x[..., -past:].clone()
    if before is None:
        before = x.new_zeros(*x.shape[:2], past)
    whole = torch.cat([before.to(x.dtype), x], dim=-1)
    # Cloned: a view would keep the whole prompt's inputs in memory.
    last = whole[..., whole.shape[-1] - past :].clone()
    if causal_conv1d_fn is not None and x.is_cuda and x.shape[-1] > 1:
        y = causal_conv1d_fn(whole, weight.squeeze(1), bias, activation="silu")
        return y[..., past:], last
    return F.silu(F.conv1d(whole, weight, bias, groups=x.shape[1])), last


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
        state: h before the first token [b, E, N]; zeros when None. A single token's kernel writes
            the new one into it.

    Returns:
        y [b, E, L] in u's dtype, and h after the last token.
    """
    if selective_scan_fn is not None and u.is_cuda and state is None:
        y, last = selective_scan_fn(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus=True, return_last_state=True
        )
        return y, last.clone()
    if selective_state_update is not None and state is not None and _is_next_token(u):
        u, delta, B, C, z = (part.squeeze(-1) for part in (u, delta, B, C, z))
        y = selective_state_update(
            state, u, delta, A, B, C, D, z=z, dt_bias=delta_bias, dt_softplus=True
        )
        return y.unsqueeze(-1), state
    return _scan_in_torch(u, delta, A, B, C, D, z, delta_bias, state)


def _is_next_token(x: Tensor) -> bool:
    """Whether the kernels of a single token, which know no gradient, may be used."""
    return x.is_cuda and x.shape[-1] == 1 and not torch.is_grad_enabled()


def _scan_in_torch(
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


def rotate(q: Tensor, k: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Rotary embedding of [b, heads, L, head dim]; halves, not neighbours, make a pair."""
    if rotary is None:
        return q, k
    cos, sin = (part[:, None] for part in rotary)
    # Together: while single tokens are written, time goes by the number of kernels.
    low, high = torch.cat([q, k], dim=1).float().chunk(2, dim=-1)
    turned = (
        torch.addcmul(low * cos, high, sin, value=-1.0),
        torch.addcmul(high * cos, low, sin),
    )
    heads = [q.shape[1], k.shape[1]]
    q, k = torch.cat(turned, dim=-1).to(q.dtype).split(heads, dim=1)
    return q, k
