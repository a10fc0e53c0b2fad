"""Causal attention where earlier keys and values are on the ranks before."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from samba_megatron.ops.context_parallel.halo import EarlierPositions
from samba_megatron.ops.registry import AUTO
from samba_megatron.ops.windowed_attention import windowed_attention
from samba_megatron.ops.windowed_attention.packing import PackedStretches


def sharded_windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: ProcessGroup | None,
    window: int | None = None,
    scale: float | None = None,
    reset: Tensor | None = None,
    packed: PackedStretches | None = None,
    backend: str = AUTO,
) -> Tensor:
    """:func:`~samba_megatron.ops.windowed_attention.windowed_attention` of one rank's queries.

    Keys and values of the window - 1 positions before the rank's own are borrowed, from as many
    ranks as hold them; without a window, those of all earlier positions. Queries that see none of
    these are computed while they are under way.

    Args:
        q: this rank's queries [s, b, heads, hd], turned by their positions in the whole sequence.
        k: its keys [s, b, kv_heads, hd], likewise.
        v: its values.
        group: the ranks that hold the sequence; None: this one alone.
        window: how many keys a query sees, itself included; None for all before it.
        scale: factor on the scores; 1/√hd when absent.
        reset: bool [ranks·s, b], True where a document starts; of the whole sequence.
        packed: gives the documents of a stretch of keys laid end to end; a kernel that wants them
            so makes them itself when absent, and waits for the device.
        backend: a backend's name, or "auto" for the fastest that can run this call.

    Returns:
        [s, b, heads·hd] in q's dtype.
    """
    length = q.shape[0]

    def attend(queries: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
        """Of queries to keys, whose first is position ``first`` of the sequence."""
        stretch = slice(first, first + keys.shape[0])
        return windowed_attention(
            queries,
            keys,
            values,
            window=window,
            scale=scale,
            reset=None if reset is None else reset[stretch],
            packed=None if packed is None else packed(stretch, queries.shape[0]),
            backend=backend,
        )

    if group is None or group.size() == 1:
        return attend(q, k, v, 0)
    reach = length * group.size() if window is None else window - 1
    earlier = EarlierPositions((k, v), min(reach, length * (group.size() - 1)), group)
    near = min(reach, length)  # so many queries see beyond the rank's own keys
    start = group.rank() * length
    parts = []
    if near < length:
        parts.append(attend(q[near:], k, v, start))
    halo_k, halo_v = earlier.wait()
    if near:
        keys, values = torch.cat([halo_k, k[:near]]), torch.cat([halo_v, v[:near]])
        parts.insert(0, attend(q[:near], keys, values, start - earlier.length))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
