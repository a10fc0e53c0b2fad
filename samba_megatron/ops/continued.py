"""Convolution, scan and attention of one piece of a sequence, going on from the pieces before it.

A piece needs of all before it what a window, a few taps and a state hold: nothing that grows with
the sequence, unless a layer attends to everything. So a sequence of any length goes through a model
piece by piece in the memory of one piece.

What is carried has names, one for each place that carries something. It may be differentiated: the
gradient of a piece's beginning is what the piece before it needs of all that follows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from samba_megatron.ops.causal_conv1d import causal_conv1d
from samba_megatron.ops.registry import AUTO
from samba_megatron.ops.selective_scan import selective_scan
from samba_megatron.ops.windowed_attention import windowed_attention
from samba_megatron.ops.windowed_attention.packing import PackedStretches


@dataclass
class Past:
    """What a piece of a sequence takes over, and what it hands on."""

    start: int = 0
    """The piece's first position in the whole sequence."""
    before: Mapping[str, Tensor] = field(default_factory=dict)
    """What the pieces before it have left, by the name of the place; empty for the first."""
    after: dict[str, Tensor] = field(default_factory=dict)
    """What it leaves, filled as the layers run."""


def continued_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    past: Past,
    name: str,
    reset: Tensor | None = None,
    backend: str = AUTO,
    convolution: Callable[..., Tensor] = causal_conv1d,
) -> Tensor:
    """:func:`~samba_megatron.ops.causal_conv1d.causal_conv1d` of one piece.

    Args:
        x: the piece's input [s, b, E].
        weight: [E, w] or [E, 1, w].
        bias: [E].
        past: carries the w - 1 last inputs.
        name: of this place in ``past``.
        reset: bool [S, b], True where a document starts; of the whole sequence.
        backend: a backend's name, or "auto" for the fastest that can run this call.
        convolution: runs the convolution of what is there by then; called as
            :func:`~samba_megatron.ops.causal_conv1d.causal_conv1d`.

    Returns:
        [s, b, E] in x's dtype.
    """
    taps = weight.shape[-1] - 1
    before = past.before.get(name)
    if before is None:
        before = x.new_zeros(taps, *x.shape[1:])
    longer = torch.cat([before, x])
    past.after[name] = longer[longer.shape[0] - taps :].clone()  # lets go of the rest
    if reset is None:
        return convolution(x, weight, bias, initial_state=before, backend=backend)
    # No fast kernel takes a state together with documents: it gets one longer sequence.
    known = min(taps, past.start)
    own = reset[past.start - known : past.start + x.shape[0]]
    y = convolution(longer[taps - known :], weight, bias, reset=own, backend=backend)
    return y[known:]


def continued_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    past: Past,
    name: str,
    reset: Tensor | None = None,
    run: Callable[..., tuple[Tensor, Tensor | None]] = selective_scan,
    **options: Any,
) -> Tensor:
    """:func:`~samba_megatron.ops.selective_scan.selective_scan` of one piece.

    Args:
        u: the piece's input [s, b, E].
        delta: its step sizes, before bias and softplus.
        A: negative rates [E, N].
        B: the piece's input projection [s, b, N].
        C: its output projection [s, b, N].
        past: carries the state [b, E, N].
        name: of this place in ``past``.
        reset: bool [S, b], True where a document starts; of the whole sequence.
        run: runs the scan; called as
            :func:`~samba_megatron.ops.selective_scan.selective_scan`.
        options: its other arguments.

    Returns:
        [s, b, E] in u's dtype.
    """
    y, state = run(
        u,
        delta,
        A,
        B,
        C,
        initial_state=past.before.get(name),
        reset=None if reset is None else reset[past.start : past.start + u.shape[0]],
        return_final_state=True,
        **options,
    )
    assert state is not None, "it was asked for"
    past.after[name] = state
    return y


def continued_windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Past,
    name: str,
    window: int | None = None,
    scale: float | None = None,
    reset: Tensor | None = None,
    packed: PackedStretches | None = None,
    backend: str = AUTO,
) -> Tensor:
    """:func:`~samba_megatron.ops.windowed_attention.windowed_attention` of one piece.

    Args:
        q: the piece's queries [s, b, heads, hd], turned by their positions in the whole sequence.
        k: its keys [s, b, kv_heads, hd], likewise.
        v: its values.
        past: carries the keys and values of the window - 1 positions before the next piece; all of
            them where there is no window.
        name: of this place in ``past``.
        window: how many keys a query sees, itself included; None for all before it.
        scale: factor on the scores; 1/√hd when absent.
        reset: bool [S, b], True where a document starts; of the whole sequence.
        packed: gives the documents of a stretch of keys laid end to end.
        backend: a backend's name, or "auto" for the fastest that can run this call.

    Returns:
        [s, b, heads·hd] in q's dtype.
    """
    stop = past.start + q.shape[0]
    if f"{name}.k" in past.before:
        k = torch.cat([past.before[f"{name}.k"], k])
        v = torch.cat([past.before[f"{name}.v"], v])
    kept = k.shape[0] if window is None else min(k.shape[0], window - 1)
    past.after[f"{name}.k"], past.after[f"{name}.v"] = (
        k[k.shape[0] - kept :],
        v[k.shape[0] - kept :],
    )
    stretch = slice(stop - k.shape[0], stop)
    return windowed_attention(
        q,
        k,
        v,
        window=window,
        scale=scale,
        reset=None if reset is None else reset[stretch],
        packed=None if packed is None else packed(stretch, q.shape[0]),
        backend=backend,
    )
