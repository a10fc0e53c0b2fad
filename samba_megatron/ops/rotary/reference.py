"""The split and the rotation written out: what the kernel is held against."""

import torch
from torch import Tensor

from samba_megatron.ops.precision import accumulation_dtype
from samba_megatron.ops.registry import ALL_DTYPES, CPU_AND_CUDA, Backend


def split_and_rotate_reference(
    qkv: Tensor, angles: Tensor, heads: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits the joined projection; turns queries and keys by their positions (arXiv 2104.09864).

    Args:
        qkv: [s, b, groups, (heads / groups + 2) * hd]: of each group its queries, key and value.
        angles: [s, 1, 1, hd], of which the second half repeats the first.
        heads: of queries.
        groups: of keys and values.

    Returns:
        q [s, b, heads, hd], k and v [s, b, groups, hd], each contiguous, in qkv's dtype.
    """
    queries = heads // groups
    slots = qkv.unflatten(-1, (queries + 2, -1))  # [s, b, groups, heads / groups + 2, hd]
    q, k, v = slots.split([queries, 1, 1], dim=-2)
    q, k = (_rotate(x.flatten(2, 3), angles) for x in (q, k))
    return q, k, v.squeeze(-2).contiguous()


def _rotate(x: Tensor, angles: Tensor) -> Tensor:
    """[s, b, n, hd], each pair (i, i + hd/2) turned by angle i; rounded once."""
    wide = accumulation_dtype(x, angles)
    half = angles[..., : x.shape[-1] // 2].to(wide)
    cos, sin = half.cos(), half.sin()
    first, second = x.to(wide).chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


BACKEND = Backend(
    name="torch",
    load=lambda: split_and_rotate_reference,
    devices=CPU_AND_CUDA,
    dtypes=ALL_DTYPES,
    features=frozenset(),
)
