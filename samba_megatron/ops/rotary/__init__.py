"""The rotary embedding, one with the split into queries, keys and values: reference, kernel and
dispatch."""

from samba_megatron.ops.rotary.dispatch import split_and_rotate
from samba_megatron.ops.rotary.reference import split_and_rotate_reference

__all__ = ["split_and_rotate", "split_and_rotate_reference"]
