"""Windowed attention as a masked softmax over all pairs: what every backend is held against."""

import math

import torch
from torch import Tensor

from samba_megatron.ops.precision import accumulation_dtype
from samba_megatron.ops.registry import ALL_DTYPES, CPU_AND_CUDA, Backend
from samba_megatron.ops.windowed_attention.mask import attention_mask, document_numbers
from samba_megatron.ops.windowed_attention.packing import PackedDocuments


def windowed_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    scale: float | None = None,
    reset: Tensor | None = None,
    packed: PackedDocuments | None = None,
) -> Tensor:
    """Causal attention within a window, scores and softmax in at least fp32.

    Args:
        q: queries [s, b, heads, hd].
        k: keys [t, b, kv_heads, hd], t >= s: the last s are those of the queries' positions, any
            before them a halo of earlier positions. `kv_heads` divides `heads`.
        v: values, as the keys.
        window: how many keys a query sees, itself included (2048 is Megatron's
            `window_size=(2047, 0)`); None for all before it.
        scale: factor on the scores; 1/√hd when absent.
        reset: bool [t, b], True where a document starts: nothing before it is attended to.
        packed: of no use to a mask.

    Returns:
        [s, b, heads·hd] in q's dtype.
    """
    length, batch, heads, head_dim = q.shape
    total = k.shape[0]
    dtype = accumulation_dtype(q, k, v)
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    k, v = (x.to(dtype).repeat_interleave(heads // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("qbhd,kbhd->bhqk", q.to(dtype), k) * scale
    allowed = attention_mask(
        slice(total - length, total), slice(0, total), window, document_numbers(reset), q.device
    )
    allowed = allowed if reset is None else allowed[:, None]
    weights = scores.masked_fill(~allowed, -math.inf).softmax(dim=-1)
    y = torch.einsum("bhqk,kbhd->qbhd", weights, v)
    return y.reshape(length, batch, heads * head_dim).to(q.dtype)


BACKEND = Backend(
    name="reference",
    load=lambda: windowed_attention_reference,
    devices=CPU_AND_CUDA,
    dtypes=ALL_DTYPES,
    features=frozenset({"reset", "halo"}),
)
