"""The operations over a sequence that several ranks hold in contiguous pieces, in their order.

Rank r of a group holds positions r·s … (r + 1)·s - 1, all ranks equally many. What a position needs
of the past comes from the ranks before: a few positions for a convolution, a window of keys and
values for attention, one state for a scan. Nothing is redistributed, whatever the heads.

Where documents begin (`reset`) every rank knows of the whole sequence: a byte a position.
Without a group, or alone in one, each operation is the plain one.
"""

from samba_megatron.ops.context_parallel.attention import sharded_windowed_attention
from samba_megatron.ops.context_parallel.convolution import sharded_causal_conv1d
from samba_megatron.ops.context_parallel.halo import EarlierPositions
from samba_megatron.ops.context_parallel.shards import own_positions
from samba_megatron.ops.context_parallel.states import RankCarry, carry_between, exclusive_scan

__all__ = [
    "EarlierPositions",
    "RankCarry",
    "carry_between",
    "exclusive_scan",
    "own_positions",
    "sharded_causal_conv1d",
    "sharded_windowed_attention",
]
