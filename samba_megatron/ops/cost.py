"""What each operation costs: the numbers that layers sum for MFU and planning, without torch.

Operations count a multiply-add as 2. They are those of the forward; a backward counts as twice its
forward. Bytes are those that ranks send to one another.
"""


def scan_flops(tokens: int, d_inner: int, d_state: int) -> int:
    """Floating-point operations of the gated selective scan.

    For each token, channel and state: Δ·A, its exponential, (Δu)·B, a multiply-add into the state
    and one with C, together 7; for each token and channel: Δ·u, the skip's multiply-add and the
    gate, together 4. Softplus and SiLU are not counted.
    """
    return tokens * d_inner * (7 * d_state + 4)


def conv_flops(tokens: int, channels: int, width: int) -> int:
    """Floating-point operations of the depthwise convolution; bias and SiLU are not counted."""
    return 2 * tokens * channels * width


def attended_pairs(length: int, window: int | None) -> int:
    """Query-key pairs of one causal sequence in which a query sees at most `window` keys."""
    reach = length if window is None else min(window, length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def attention_flops(length: int, heads: int, head_dim: int, window: int | None) -> int:
    """Floating-point operations of one sequence's attention; the softmax is not counted.

    For each attended pair and head, a multiply-add a dimension for the score and for the value.
    """
    return 4 * attended_pairs(length, window) * heads * head_dim


def halo_bytes(ranks: int, length: int, count: int, numbers: int, element_size: int) -> int:
    """The most that a rank sends where each asks for the ``count`` positions before its own.

    The first rank's, which all others may ask; backward, the gradients of as many come back.

    Args:
        ranks: that share a sequence.
        length: positions of each rank.
        count: positions wanted: a convolution's width - 1, a window - 1.
        numbers: of a position, all sequences of the batch together.
        element_size: bytes of a number.
    """
    return min(count, length * (ranks - 1)) * numbers * element_size


def carry_bytes(ranks: int, batch: int, d_inner: int, d_state: int) -> int:
    """The most that a rank sends for the state of a scan over ``ranks``, in either direction.

    Decay and state in fp32 each round, but the last only the state.
    """
    rounds = 0 if ranks == 1 else 1 + (ranks - 2).bit_length()
    return max(2 * rounds - 1, 0) * batch * d_inner * d_state * 4
