"""The operations that look back along a sequence, wherever its earlier positions are: here, on the
ranks before (context parallelism), or in pieces that have been computed (``sequence_pieces``)."""

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from samba_megatron.model.sequence import SequenceParams
from samba_megatron.ops.context_parallel import (
    carry_between,
    own_positions,
    sharded_causal_conv1d,
    sharded_windowed_attention,
)
from samba_megatron.ops.continued import (
    continued_causal_conv1d,
    continued_selective_scan,
    continued_windowed_attention,
)
from samba_megatron.ops.selective_scan import selective_scan


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sequence: SequenceParams,
    group: ProcessGroup | None,
    name: str,
    backend: str,
) -> Tensor:
    """The causal convolution: [s, b, E] → [s, b, E].

    Args:
        x: this rank's or this piece's input.
        weight: [E, 1, w].
        bias: [E].
        sequence: where documents begin, and what precedes a piece.
        group: the context-parallel ranks.
        name: of this place in the model.
        backend: of the kernel.
    """
    reset = sequence.reset
    if sequence.past is not None:
        return continued_causal_conv1d(x, weight, bias, sequence.past, name, reset, backend)
    return sharded_causal_conv1d(x, weight, bias, group, reset=reset, backend=backend)


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    sequence: SequenceParams,
    group: ProcessGroup | None,
    name: str,
    **options: Any,
) -> Tensor:
    """The selective scan: [s, b, E] → [s, b, E].

    Args:
        u: this rank's or this piece's input; delta, B and C likewise.
        delta: step sizes before bias and softplus.
        A: negative rates [E, N].
        B: input projection [s, b, N].
        C: output projection [s, b, N].
        sequence: where documents begin, and what precedes a piece.
        group: the context-parallel ranks.
        name: of this place in the model.
        options: the scan's further arguments.
    """
    reset, past = sequence.reset, sequence.past
    if past is not None:
        return continued_selective_scan(u, delta, A, B, C, past, name, reset=reset, **options)
    own = None if reset is None else own_positions(reset, group)
    y, _ = selective_scan(u, delta, A, B, C, reset=own, carry=carry_between(group), **options)
    return y


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequence: SequenceParams,
    group: ProcessGroup | None,
    name: str,
    window: int | None,
    scale: float | None,
    backend: str,
) -> Tensor:
    """Attention by one of this project's kernels: [s, b, heads, hd] → [s, b, heads · hd].

    Args:
        q: this rank's or this piece's queries, turned by their positions in the whole sequence.
        k: its keys [s, b, groups, hd].
        v: its values.
        sequence: where documents begin, and what precedes a piece.
        group: the context-parallel ranks.
        name: of this place in the model.
        window: keys that a query sees, itself included; None: all before it.
        scale: factor on the scores; 1/√hd when absent.
        backend: of the kernel.
    """
    options: dict[str, Any] = {
        "window": window,
        "scale": scale,
        "reset": sequence.reset,
        "packed": sequence.packed,
        "backend": backend,
    }
    if sequence.past is not None:
        return continued_windowed_attention(q, k, v, sequence.past, name, **options)
    return sharded_windowed_attention(q, k, v, group, **options)
