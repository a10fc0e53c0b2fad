"""The operations that look back along a sequence, wherever its earlier positions are: here, on the
ranks before (context parallelism), or in pieces that have been computed (``sequence_pieces``)."""

from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from samba_megatron.model.recomputation import (
    following,
    recomputable,
    recomputable_with_graph,
    same_memory,
)
from samba_megatron.model.sequence import SequenceParams
from samba_megatron.ops.causal_conv1d import causal_conv1d
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
from samba_megatron.ops.registry import AUTO
from samba_megatron.ops.selective_scan import selective_scan


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sequence: SequenceParams,
    group: ProcessGroup | None,
    name: str,
    backend: str,
    recompute: bool = False,
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
        recompute: whether readers may let the result go: without messages and without writing to
            what follows, it is computed again from what had been fetched.
    """
    own = _RecomputableConvolution() if recompute else causal_conv1d
    x, reset = sequence.apart(x), sequence.reset
    options: dict[str, Any] = {"backend": backend, "convolution": own}
    if sequence.past is not None:
        y = continued_causal_conv1d(x, weight, bias, sequence.past, name, reset, **options)
    else:
        y = sharded_causal_conv1d(x, weight, bias, group, reset, **options)
    if isinstance(own, _RecomputableConvolution):
        y = same_memory(y, own.result)
    return y if sequence.past is not None else following(sequence.joined, y)


class _RecomputableConvolution:
    """The convolution of one call, as something that its readers can let go."""

    result: Tensor

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None = None,
        reset: Tensor | None = None,
        backend: str = AUTO,
    ) -> Tensor:
        """As :func:`~samba_megatron.ops.causal_conv1d.causal_conv1d`."""
        arguments = (x, weight, bias, initial_state, reset, backend)
        self.result = recomputable(causal_conv1d, *arguments)
        return self.result


def scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    sequence: SequenceParams,
    group: ProcessGroup | None,
    name: str,
    z: Tensor,
    recompute: bool = False,
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
        z: gate, as u.
        recompute: whether the states, and by readers the result, are let go and computed again;
            between ranks with messages once more.
        options: the scan's further arguments.
    """
    run = _recomputable_scan if recompute else selective_scan
    reset, past = sequence.reset, sequence.past
    if past is not None:
        return continued_selective_scan(u, delta, A, B, C, past, name, reset, run, z=z, **options)
    u, delta, B, C, z = (same_memory(sequence.apart(x), x) for x in (u, delta, B, C, z))
    own = None if reset is None else own_positions(reset, group)
    y, _ = run(u, delta, A, B, C, reset=own, carry=carry_between(group), z=z, **options)
    return following(sequence.joined, y)


def _recomputable_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """As :func:`~samba_megatron.ops.selective_scan.selective_scan`."""
    names = [name for name, value in options.items() if isinstance(value, Tensor)]
    rest = {name: value for name, value in options.items() if name not in names}

    def run(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        given: dict[str, Any] = {**rest, **dict(zip(names, tensors, strict=True))}
        return selective_scan(u, delta, A, B, C, **given)

    tensors = (options[name] for name in names)
    y, state = recomputable_with_graph(run, u, delta, A, B, C, *tensors)
    return y, state


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
    q, k, v = (sequence.apart(x) for x in (q, k, v))
    return sequence.joined(sharded_windowed_attention(q, k, v, group, **options))
