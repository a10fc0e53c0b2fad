"""Backend "torch": windowed attention on `scaled_dot_product_attention`, on any device.

That function knows a causal mask but no window. When the window bites, queries go block by block,
each block against only the keys that it can see: work and memory grow as s·window, not s².

Heads that share keys and values are a stride of 0 over them, not copies of them: the batch axis of
the kernel is (batch, kv_head) and its head axis the heads of one group.

Half precision is computed in fp32 on a CPU, whose kernel sums gradients in the inputs' dtype.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from samba_megatron.ops.precision import accumulation_dtype
from samba_megatron.ops.registry import ALL_DTYPES, CPU_AND_CUDA, Backend
from samba_megatron.ops.windowed_attention.mask import attention_mask, document_numbers
from samba_megatron.ops.windowed_attention.packing import PackedDocuments

MIN_QUERY_BLOCK = 128
"""Fewest queries a block: below it the calls cost more than the masked-out pairs they save."""


def windowed_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    scale: float | None = None,
    reset: Tensor | None = None,
    packed: PackedDocuments | None = None,
) -> Tensor:
    """As :func:`~samba_megatron.ops.windowed_attention.reference.windowed_attention_reference`."""
    length, batch, heads, head_dim = q.shape
    total, _, kv_heads, _ = k.shape
    dtype = q.dtype if q.is_cuda else accumulation_dtype(q, k, v)
    grouped_q, grouped_k, grouped_v = (
        x.to(dtype).reshape(x.shape[0], batch * kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        for x in (q, k, v)
    )
    if reset is None and total == length and (window is None or window >= length):
        y = _attend(grouped_q, grouped_k, grouped_v, None, scale)
    else:
        window = total if window is None else min(window, total)
        documents = document_numbers(reset)
        y = _attend_in_blocks(grouped_q, grouped_k, grouped_v, window, scale, documents)
    return y.reshape(length, batch, heads * head_dim).to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float | None) -> Tensor:
    """One kernel call, causal when `allowed` is None; [g, h, s, hd] in, [s, g, h, hd] out."""
    k, v = k.expand(-1, q.shape[1], -1, -1), v.expand(-1, q.shape[1], -1, -1)
    y = scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=allowed is None, scale=scale
    )
    return y.permute(2, 0, 1, 3)


def _attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None, documents: Tensor | None
) -> Tensor:
    """Attention of each block of queries to the blocks of keys within its reach.

    Keys are split once and joined for each block rather than sliced: a slice's gradient is as long
    as the whole sequence, which would bring s² back. They are split in fp32 at least, because that
    is where the gradients of the query blocks that share a key are summed.
    """
    wide = accumulation_dtype(k, v)
    length, total = q.shape[2], k.shape[2]
    block = max(MIN_QUERY_BLOCK, window // 8)
    offset = total - length
    key_blocks, value_blocks = k.to(wide).split(block, dim=2), v.to(wide).split(block, dim=2)
    outputs = []
    for index, queries in enumerate(q.split(block, dim=2)):
        start = offset + index * block
        stop = start + queries.shape[2]
        first, last = max(0, start - window + 1) // block, (stop - 1) // block + 1
        keys = slice(first * block, min(last * block, total))
        allowed = attention_mask(slice(start, stop), keys, window, documents, q.device)
        if documents is not None:
            kv_heads = q.shape[0] // documents.shape[1]
            allowed = allowed.repeat_interleave(kv_heads, dim=0)[:, None]
        outputs.append(
            _attend(
                queries,
                torch.cat(key_blocks[first:last], dim=2).to(k.dtype),
                torch.cat(value_blocks[first:last], dim=2).to(v.dtype),
                allowed,
                scale,
            )
        )
    return torch.cat(outputs)


BACKEND = Backend(
    name="torch",
    load=lambda: windowed_attention_torch,
    devices=CPU_AND_CUDA,
    dtypes=ALL_DTYPES,
    features=frozenset({"reset", "halo"}),
)
