"""RMSNorm with the residual stream beside it: reference, kernel and dispatch."""

from samba_megatron.ops.rms_norm.dispatch import rms_norm
from samba_megatron.ops.rms_norm.reference import rms_norm_reference

__all__ = ["rms_norm", "rms_norm_reference"]
