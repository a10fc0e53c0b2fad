"""SwiGLU, the gate of the MLPs: reference, kernel and dispatch."""

from samba_megatron.ops.swiglu.dispatch import swiglu
from samba_megatron.ops.swiglu.reference import swiglu_reference

__all__ = ["swiglu", "swiglu_reference"]
