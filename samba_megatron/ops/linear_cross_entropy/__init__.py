"""The head and its loss as one operation, which holds the logits of some tokens at a time."""

from samba_megatron.ops.linear_cross_entropy.dispatch import linear_cross_entropy
from samba_megatron.ops.linear_cross_entropy.reference import linear_cross_entropy_reference

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference"]
