"""Causal sliding-window attention: reference, kernels and dispatch."""

from samba_megatron.ops.windowed_attention.dispatch import windowed_attention
from samba_megatron.ops.windowed_attention.reference import windowed_attention_reference

__all__ = ["windowed_attention", "windowed_attention_reference"]
