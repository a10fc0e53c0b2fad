"""All operations at once: what could run on this machine, and what did."""

from samba_megatron.ops.causal_conv1d.dispatch import CAUSAL_CONV1D
from samba_megatron.ops.linear_cross_entropy.dispatch import LINEAR_CROSS_ENTROPY
from samba_megatron.ops.registry import Operation
from samba_megatron.ops.rms_norm.dispatch import RMS_NORM
from samba_megatron.ops.rotary.dispatch import ROTARY
from samba_megatron.ops.selective_scan.dispatch import SELECTIVE_SCAN
from samba_megatron.ops.swiglu.dispatch import SWIGLU
from samba_megatron.ops.windowed_attention.dispatch import WINDOWED_ATTENTION

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        SELECTIVE_SCAN,
        CAUSAL_CONV1D,
        WINDOWED_ATTENTION,
        SWIGLU,
        RMS_NORM,
        ROTARY,
        LINEAR_CROSS_ENTROPY,
    )
}
"""Every operation by its name."""


def last_backends() -> dict[str, str | None]:
    """The backend that each operation's latest call ran on; None for one not called yet."""
    return {name: operation.last_backend for name, operation in OPERATIONS.items()}
