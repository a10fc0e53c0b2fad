"""The causal convolution's one entrance: checks the call, chooses the kernel, runs it."""

from torch import Tensor

from samba_megatron.ops.causal_conv1d import package_kernel, reference, torch_conv
from samba_megatron.ops.registry import AUTO, Operation, Request, span

CAUSAL_CONV1D = Operation(
    "causal_conv1d", [package_kernel.BACKEND, torch_conv.BACKEND, reference.BACKEND]
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    backend: str = AUTO,
) -> Tensor:
    """Depthwise causal convolution over time, then bias and SiLU: silu(Σ_d w_d x_{t-d} + bias).

    Sums are fp32 whatever the dtype of the activations (fp64 if any argument is).

    Args:
        x: input [L, b, E].
        weight: [E, w] or [E, 1, w]; the last column meets the current position.
        bias: [E].
        initial_state: the w - 1 positions before the first, [w - 1, b, E]; zeros when absent.
        reset: bool [L, b], True where a document starts: positions before it count as zero.
        backend: a backend's name, or "auto" for the fastest that can run this call.

    Returns:
        [L, b, E] in x's dtype.

    Raises:
        ValueError: shapes do not fit together.
        UserError: the named backend is unknown or cannot run this call.
    """
    weight = weight.squeeze(1) if weight.dim() == 3 else weight
    _check_shapes(x, weight, bias, initial_state, reset)
    features = {"initial_state": initial_state is not None, "reset": reset is not None}
    request = Request(
        device=x.device.type,
        dtype=x.dtype,
        features=frozenset(name for name, used in features.items() if used),
        sizes={"channels": x.shape[2], "width": weight.shape[1], "span": span(x)},
    )
    return CAUSAL_CONV1D.choose(backend, request).run(x, weight, bias, initial_state, reset)


def _check_shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    reset: Tensor | None,
) -> None:
    """Raises ValueError naming the first argument whose shape does not fit x's and weight's."""
    if x.dim() != 3 or weight.dim() != 2:
        shapes = f"{list(x.shape)} and {list(weight.shape)}"
        raise ValueError(f"x must be [L, b, E] and weight [E, w] or [E, 1, w], not {shapes}")
    length, batch, channels = x.shape
    width = weight.shape[1]
    expected = {
        "weight": (weight, (channels, width)),
        "bias": (bias, (channels,)),
        "initial_state": (initial_state, (width - 1, batch, channels)),
        "reset": (reset, (length, batch)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} must be {list(shape)} for x {list(x.shape)}, not {list(tensor.shape)}"
            )
