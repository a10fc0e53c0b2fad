"""The rotary embedding's one entrance: checks the call, chooses the kernel, runs it."""

from torch import Tensor

from samba_megatron.ops.registry import AUTO, Operation, Request
from samba_megatron.ops.rotary import reference, triton_rotary

ROTARY = Operation("rotary", [triton_rotary.BACKEND, reference.BACKEND])


def split_and_rotate(
    qkv: Tensor, angles: Tensor, heads: int, groups: int, backend: str = AUTO
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits the joined projection; turns queries and keys by their positions (arXiv 2104.09864).

    Dimension i of a head and dimension i + hd/2 are a pair, turned by angle i: megatron's layout,
    not the interleaved one.

    Args:
        qkv: [s, b, groups, (heads / groups + 2) * hd]: of each group its queries, key and value.
        angles: fp32 [s, 1, 1, hd], of which the second half repeats the first; without a gradient.
        heads: of queries.
        groups: of keys and values; divides ``heads``.
        backend: a backend's name, or "auto" for the fastest that can run this call.

    Returns:
        q [s, b, heads, hd], k and v [s, b, groups, hd], each contiguous, in qkv's dtype.

    Raises:
        ValueError: the shapes are not these, or hd is odd.
        UserError: the named backend is unknown or cannot run this call.
    """
    slots = heads // groups + 2
    if heads % groups or qkv.dim() != 4 or qkv.shape[2] != groups or qkv.shape[3] % (2 * slots):
        raise ValueError(
            f"qkv must be [s, b, {groups}, ({heads} / {groups} + 2) * hd] with an even hd, "
            f"not {list(qkv.shape)}"
        )
    wanted = [qkv.shape[0], 1, 1, qkv.shape[3] // slots]
    if list(angles.shape) != wanted:
        raise ValueError(f"angles must be {wanted}, not {list(angles.shape)}")
    request = Request(device=qkv.device.type, dtype=qkv.dtype)
    return ROTARY.choose(backend, request).run(qkv, angles, heads, groups)
