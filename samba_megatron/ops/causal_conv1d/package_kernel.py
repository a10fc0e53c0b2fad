"""Backend "causal_conv1d": the CUDA kernel of the causal-conv1d package.

Its channels-last mode takes [batch, channel, time] with channels contiguous, which is a view of
[time, batch, channel]: nothing is copied. That mode wants the channels in eights.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from samba_megatron.ops.registry import CUDA_ONLY, FLOAT_DTYPES, Backend, Request, beyond_32_bits


def _load() -> Callable[..., Tensor]:
    from causal_conv1d import causal_conv1d_fn

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        initial_state: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> Tensor:
        """As :func:`~samba_megatron.ops.causal_conv1d.reference.causal_conv1d_reference`."""
        y = causal_conv1d_fn(
            _channels_last(x),
            weight,
            bias,
            seq_idx=None if reset is None else _document_index(reset),
            initial_states=None if initial_state is None else _channels_last(initial_state),
            activation="silu",
        )
        return y.permute(2, 0, 1)

    return run


def _channels_last(x: Tensor) -> Tensor:
    """[L, b, E] as [b, E, L] with contiguous channels: a view, unless channels were strided."""
    return (x if x.stride(2) == 1 else x.contiguous()).permute(1, 2, 0)


def _document_index(reset: Tensor) -> Tensor:
    """The number of each position's document, int32 [b, L]."""
    # Along the contiguous dimension torch sums fifty times as fast.
    return reset.t().contiguous().cumsum(1, dtype=torch.int32)


def _refuses(request: Request) -> str | None:
    if not 2 <= request.sizes["width"] <= 4:
        return f"it takes kernels 2 to 4 wide, not {request.sizes['width']}"
    if request.sizes["channels"] % 8:
        return f"it takes channels in multiples of 8, not {request.sizes['channels']}"
    if {"initial_state", "reset"} <= request.features:
        return "it does not take initial_state together with reset"
    return beyond_32_bits(request)


BACKEND = Backend(
    name="causal_conv1d",
    load=_load,
    devices=CUDA_ONLY,
    dtypes=FLOAT_DTYPES,
    features=frozenset({"initial_state", "reset"}),
    package="causal_conv1d",
    refuses=_refuses,
)
