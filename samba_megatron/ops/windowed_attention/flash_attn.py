"""Backend "flash_attn": the CUDA kernels of the flash-attn package, which know the window.

They take [batch, time, head, head_dim] with any strides before the last: Megatron's
[time, batch, head, head_dim] is a view of that, and so is the output. With documents, the kernel
for sequences of several lengths takes all of them laid end to end, [batch * time, head, head_dim]:
a document is a sequence of its own there, and what lies before it is not looked at.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from samba_megatron.ops.registry import CUDA_ONLY, HALF_DTYPES, Backend, Request
from samba_megatron.ops.windowed_attention.packing import (
    PackedDocuments,
    lay_end_to_end,
    pack_documents,
    put_side_by_side,
)

MAX_HEAD_DIM = 256


def _load() -> Callable[..., Tensor]:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None = None,
        scale: float | None = None,
        reset: Tensor | None = None,
        packed: PackedDocuments | None = None,
    ) -> Tensor:
        """As :func:`~.reference.windowed_attention_reference`."""
        options: dict[str, Any] = {
            "softmax_scale": scale,
            "causal": True,
            "window_size": (-1, -1) if window is None else (window - 1, 0),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }
        if reset is None:
            y = flash_attn_func(*(x.transpose(0, 1) for x in (q, k, v)), **options)
            return y.transpose(0, 1).flatten(2)
        packed = packed or pack_documents(reset, q.shape[0])
        return attend_packed(flash_attn_varlen_func, q, k, v, packed, options)

    return run


def attend_packed(
    kernel: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: PackedDocuments,
    options: dict[str, Any],
) -> Tensor:
    """Attention inside documents: [s, b, heads, hd] → [s, b, heads·hd].

    Args:
        kernel: ``flash_attn_varlen_func``. It aligns a document's queries with its last keys, as
            they are where the keys have a halo.
        q: queries.
        k: keys [t, b, kv_heads, hd].
        v: values.
        packed: the documents of the batch.
        options: what else the kernel takes.
    """
    y = kernel(
        *(lay_end_to_end(x) for x in (q, k, v)),
        packed.query_ends,
        packed.key_ends,
        packed.most_queries,
        packed.most_keys,
        **options,
    )
    return put_side_by_side(y, q.shape[1])


def _refuses(request: Request) -> str | None:
    head_dim = request.sizes["head_dim"]
    if head_dim > MAX_HEAD_DIM:
        return f"it takes head dimensions up to {MAX_HEAD_DIM}, not {head_dim}"
    return None


BACKEND = Backend(
    name="flash_attn",
    load=_load,
    devices=CUDA_ONLY,
    dtypes=HALF_DTYPES,
    features=frozenset({"reset", "halo"}),
    package="flash_attn",
    refuses=_refuses,
)
