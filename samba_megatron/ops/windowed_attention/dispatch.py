"""Windowed attention's one entrance: checks the call, chooses the kernel, runs it."""

from torch import Tensor

from samba_megatron.ops.registry import AUTO, Operation, Request
from samba_megatron.ops.windowed_attention import (
    flash_attn,
    reference,
    torch_attention,
    transformer_engine,
)
from samba_megatron.ops.windowed_attention.packing import PackedDocuments

WINDOWED_ATTENTION = Operation(
    "windowed_attention",
    [transformer_engine.BACKEND, flash_attn.BACKEND, torch_attention.BACKEND, reference.BACKEND],
)


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    scale: float | None = None,
    reset: Tensor | None = None,
    packed: PackedDocuments | None = None,
    backend: str = AUTO,
) -> Tensor:
    """Causal self-attention in which each query sees its `window` latest keys, itself included.

    Args:
        q: queries [s, b, heads, hd].
        k: keys [t, b, kv_heads, hd], t >= s: the last s are those of the queries' positions, any
            before them a halo of earlier positions. `kv_heads` divides `heads`.
        v: values, as the keys.
        window: how many keys a query sees, itself included (2048 is Megatron's
            `window_size=(2047, 0)`); None for all before it.
        scale: factor on the scores; 1/√hd when absent.
        reset: bool [t, b], True where a document starts: nothing before it is attended to.
        packed: the same documents as :func:`~.packing.pack_documents` gives them; a kernel that
            wants them so makes them itself when absent, and waits for the device.
        backend: a backend's name, or "auto" for the fastest that can run this call.

    Returns:
        [s, b, heads·hd] in q's dtype; how it lies in memory is the kernel's choice.

    Raises:
        ValueError: shapes do not fit together, or the window is not positive.
        UserError: the named backend is unknown or cannot run this call.
    """
    _check(q, k, v, window, reset, packed)
    features = {"reset": reset is not None, "halo": k.shape[0] > q.shape[0]}
    request = Request(
        device=q.device.type,
        dtype=q.dtype,
        features=frozenset(name for name, used in features.items() if used),
        sizes={"head_dim": q.shape[3]},
    )
    chosen = WINDOWED_ATTENTION.choose(backend, request)
    return chosen.run(q, k, v, window, scale, reset, packed)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    reset: Tensor | None,
    packed: PackedDocuments | None,
) -> None:
    """Raises ValueError for a call that no backend could make sense of."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v must be [s, b, heads, hd] with k and v alike, not {shapes}")
    if k.shape[0] < q.shape[0] or (k.shape[1], k.shape[3]) != (q.shape[1], q.shape[3]):
        raise ValueError(f"keys {list(k.shape)} do not fit queries {list(q.shape)}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key heads do not divide {q.shape[2]} query heads")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, not {window}")
    if reset is not None and reset.shape != k.shape[:2]:
        raise ValueError(f"reset must be {list(k.shape[:2])}, not {list(reset.shape)}")
    if packed is not None and reset is None:
        raise ValueError("packed says of reset's documents how they lie, and there is no reset")
