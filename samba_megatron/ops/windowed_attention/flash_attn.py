"""Backend "flash_attn": the CUDA kernel of the flash-attn package, which knows the window.

It takes [batch, time, head, head_dim] with any strides before the last: Megatron's
[time, batch, head, head_dim] is a view of that, and so is its output. Documents are refused: they
need the sequences packed end to end.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from samba_megatron.ops.registry import CUDA_ONLY, HALF_DTYPES, Backend, Request

MAX_HEAD_DIM = 256


def _load() -> Callable[..., Tensor]:
    from flash_attn import flash_attn_func

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None = None,
        scale: float | None = None,
        reset: Tensor | None = None,
    ) -> Tensor:
        """As :func:`~.reference.windowed_attention_reference`."""
        if reset is not None:
            raise ValueError("the flash_attn kernel takes no reset")
        y = flash_attn_func(
            q.transpose(0, 1),
            k.transpose(0, 1),
            v.transpose(0, 1),
            softmax_scale=scale,
            causal=True,
            window_size=(-1, -1) if window is None else (window - 1, 0),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return y.transpose(0, 1).flatten(2)

    return run


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
    features=frozenset(),
    package="flash_attn",
    refuses=_refuses,
)
