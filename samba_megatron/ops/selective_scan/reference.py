"""The selective scan as the paper writes it: what every other backend is held against."""

import torch
from torch import Tensor
from torch.nn import functional as F

from samba_megatron.ops.precision import accumulation_dtype
from samba_megatron.ops.registry import ALL_DTYPES, CPU_AND_CUDA, Backend


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Selective state space model, one time step after another (arXiv 2312.00752, section 3).

    With Δ_t = softplus(delta_t + delta_bias), for every channel and state:
    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t and y_t = (C_t · h_t + D u_t) silu(z_t).

    Args:
        u: input [L, b, E].
        delta: step size before its bias and softplus, [L, b, E].
        A: negative rates [E, N].
        B: input projection [L, b, N].
        C: output projection [L, b, N].
        D: skip weight [E].
        z: gate before its SiLU, [L, b, E].
        delta_bias: [E].
        delta_softplus: whether Δ is the softplus of delta or delta itself.
        initial_state: state before the first position [b, E, N]; zeros when absent.
        reset: bool [L, b], True where a document starts: the state before it counts as zero.

    Returns:
        The output [L, b, E] in u's dtype, and the state after the last position [b, E, N] in fp32
        (fp64 if any argument is).
    """
    dtype = accumulation_dtype(u, delta, A, B, C, D, z, delta_bias, initial_state)
    u_wide, step, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    if delta_bias is not None:
        step = step + delta_bias.to(dtype)
    if delta_softplus:
        step = F.softplus(step)
    state = u_wide.new_zeros((*u.shape[1:], A.shape[1]))
    if initial_state is not None:
        state = initial_state.to(dtype)

    outputs = []
    for t in range(u.shape[0]):
        if reset is not None:
            state = state.masked_fill(reset[t, :, None, None], 0.0)
        decay = torch.exp(step[t, :, :, None] * A)
        state = decay * state + (step[t] * u_wide[t])[:, :, None] * B[t, :, None, :]
        outputs.append((state * C[t, :, None, :]).sum(dim=-1))

    y = torch.stack(outputs)
    if D is not None:
        y = y + D.to(dtype) * u_wide
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), state


BACKEND = Backend(
    name="reference",
    load=lambda: selective_scan_reference,
    devices=CPU_AND_CUDA,
    dtypes=ALL_DTYPES,
    features=frozenset({"initial_state", "final_state", "final_state_gradient", "reset"}),
)
