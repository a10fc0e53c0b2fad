"""Backend "mamba_ssm": the CUDA kernel of the mamba-ssm package.

The kernel wants [batch, channel, time] with time contiguous, so every [time, batch, channel]
activation is copied once on the way in and the output once on the way out. It starts from a zero
state, knows no document starts, and its final state has no gradient: those calls are refused.
"""

from collections.abc import Callable

from torch import Tensor

from samba_megatron.ops.registry import CUDA_ONLY, FLOAT_DTYPES, Backend, Request, beyond_32_bits

MAX_STATE = 256
"""The largest d_state the kernel is built for."""


def _load() -> Callable[..., tuple[Tensor, Tensor]]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def run(
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
        """As :func:`~samba_megatron.ops.selective_scan.reference.selective_scan_reference`.

        The kernel takes its activations in one dtype: delta, B, C and z are rounded to u's.
        """
        if initial_state is not None or reset is not None:
            raise ValueError("the mamba_ssm kernel takes neither initial_state nor reset")
        y, final_state = selective_scan_fn(
            _time_last(u, u),
            _time_last(delta, u),
            A.float(),
            _time_last(B, u),
            _time_last(C, u),
            None if D is None else D.float(),
            None if z is None else _time_last(z, u),
            None if delta_bias is None else delta_bias.float(),
            delta_softplus,
            return_last_state=True,
        )
        return y.permute(2, 0, 1).contiguous(), final_state.detach()

    return run


def _time_last(tensor: Tensor, like: Tensor) -> Tensor:
    """[L, b, x] to contiguous [b, x, L] in `like`'s dtype: one copy."""
    return tensor.to(like.dtype).permute(1, 2, 0).contiguous()


def _refuses(request: Request) -> str | None:
    d_state = request.sizes["d_state"]
    if d_state > MAX_STATE:
        return f"it takes d_state up to {MAX_STATE}, not {d_state}"
    return beyond_32_bits(request)


BACKEND = Backend(
    name="mamba_ssm",
    load=_load,
    devices=CUDA_ONLY,
    dtypes=FLOAT_DTYPES,
    features=frozenset({"final_state"}),
    package="mamba_ssm",
    refuses=_refuses,
)
