"""The selective scan's one entrance: checks the call, chooses the kernel, runs it."""

import torch
from torch import Tensor

from samba_megatron.ops.registry import AUTO, Operation, Request
from samba_megatron.ops.selective_scan import fused, mamba_ssm, reference, torch_scan
from samba_megatron.ops.selective_scan.carry import Carry

SELECTIVE_SCAN = Operation(
    "selective_scan", [fused.BACKEND, mamba_ssm.BACKEND, torch_scan.BACKEND, reference.BACKEND]
)


def selective_scan(
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
    return_final_state: bool = False,
    carry: Carry | None = None,
    backend: str = AUTO,
) -> tuple[Tensor, Tensor | None]:
    """Selective state space model over [L, b, E] (arXiv 2312.00752, section 3).

    With Δ_t = softplus(delta_t + delta_bias), for every channel and state:
    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t and y_t = (C_t · h_t + D u_t) silu(z_t).

    The state and every sum are fp32 whatever the dtype of the activations (fp64 if any argument
    is). All floating arguments are differentiable, and so is the final state.

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
        return_final_state: whether the state after the last position is wanted.
        carry: joins this scan to those of the positions before and after, which others hold; in
            the place of both states.
        backend: a backend's name, or "auto" for the fastest that can run this call.

    Returns:
        The output [L, b, E] in u's dtype, and the final state [b, E, N] in fp32 (or fp64) or None.

    Raises:
        ValueError: shapes do not fit together, or a carry comes with a state.
        UserError: the named backend is unknown or cannot run this call.
    """
    if carry is not None and (initial_state is not None or return_final_state):
        raise ValueError("a scan with a carry has neither an initial nor a final state of its own")
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    _check_shapes(*inputs, reset)
    features = {
        "initial_state": initial_state is not None,
        "reset": reset is not None,
        "carry": carry is not None,
        "final_state": return_final_state,
        "final_state_gradient": return_final_state and _needs_gradient(*inputs),
    }
    request = Request(
        device=u.device.type,
        dtype=u.dtype,
        features=frozenset(name for name, used in features.items() if used),
        sizes={"d_state": A.shape[1], "span": u.numel()},
    )
    joined = {} if carry is None else {"carry": carry}
    y, final_state = SELECTIVE_SCAN.choose(backend, request).run(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, reset, **joined
    )
    return y, final_state if return_final_state else None


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check_shapes(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
) -> None:
    """Raises ValueError naming the first argument whose shape does not fit u's and A's."""
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(f"u must be [L, b, E] and A [E, N], not {list(u.shape)}, {list(A.shape)}")
    length, batch, channels = u.shape
    states = A.shape[1]
    expected = {
        "delta": (delta, (length, batch, channels)),
        "A": (A, (channels, states)),
        "B": (B, (length, batch, states)),
        "C": (C, (length, batch, states)),
        "D": (D, (channels,)),
        "z": (z, (length, batch, channels)),
        "delta_bias": (delta_bias, (channels,)),
        "initial_state": (initial_state, (batch, channels, states)),
        "reset": (reset, (length, batch)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for u {list(u.shape)}, not {list(tensor.shape)}"
            )
