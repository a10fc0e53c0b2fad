"""The short causal convolution of Mamba with its SiLU: reference, kernels and dispatch."""

from samba_megatron.ops.causal_conv1d.dispatch import causal_conv1d
from samba_megatron.ops.causal_conv1d.reference import causal_conv1d_reference

__all__ = ["causal_conv1d", "causal_conv1d_reference"]
