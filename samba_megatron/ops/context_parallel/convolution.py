"""The causal convolution where the positions before the first are on the rank before."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from samba_megatron.ops.causal_conv1d import causal_conv1d
from samba_megatron.ops.context_parallel.halo import EarlierPositions
from samba_megatron.ops.registry import AUTO


def sharded_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group: ProcessGroup | None,
    reset: Tensor | None = None,
    backend: str = AUTO,
    convolution: Callable[..., Tensor] = causal_conv1d,
) -> Tensor:
    """:func:`~samba_megatron.ops.causal_conv1d.causal_conv1d` of one rank's positions.

    It moves the width - 1 last positions of every rank, forward and backward.

    Args:
        x: this rank's input [s, b, E].
        weight: [E, w] or [E, 1, w], the same on every rank.
        bias: [E].
        group: the ranks that hold the sequence; None: this one alone.
        reset: bool [ranks·s, b], True where a document starts; of the whole sequence.
        backend: a backend's name, or "auto" for the fastest that can run this call.
        convolution: runs the convolution of what is on this rank by then; called as
            :func:`~samba_megatron.ops.causal_conv1d.causal_conv1d`.

    Returns:
        [s, b, E] in x's dtype.
    """
    if group is None or group.size() == 1:
        return convolution(x, weight, bias, reset=reset, backend=backend)
    wanted = weight.shape[-1] - 1
    earlier = EarlierPositions((x,), wanted, group)
    (halo,) = earlier.wait()
    if reset is None:
        zeros = x.new_zeros(wanted - earlier.length, *x.shape[1:])
        state = torch.cat([zeros, halo])
        return convolution(x, weight, bias, initial_state=state, backend=backend)
    # No fast kernel takes a state together with documents: it gets one longer sequence.
    end = (group.rank() + 1) * x.shape[0]
    own = reset[end - x.shape[0] - earlier.length : end]
    y = convolution(torch.cat([halo, x]), weight, bias, reset=own, backend=backend)
    return y[earlier.length :]
