"""What each operation costs: the numbers that layers sum for MFU and planning, without torch.

Operations count a multiply-add as 2. They are those of the forward; a backward counts as twice its
forward. Bytes are those that ranks send to one another.

What an operation must at least do on a device, forward and backward (:class:`Work`), is counted
apart: a measured time is held against it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """The least that a pass of an operation must do, whatever the kernel."""

    bytes: int
    """Inputs read once, outputs written once."""
    products: int = 0
    """Floating-point operations of matrix products, which matrix units can do."""
    flops: int = 0
    """All other floating-point operations, without exponentials."""
    exponentials: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.bytes + other.bytes,
            self.products + other.products,
            self.flops + other.flops,
            self.exponentials + other.exponentials,
        )


@dataclass(frozen=True)
class Passes:
    """An operation's two passes, one after the other: what the first computes and does not write
    out, the second computes again."""

    forward: Work
    backward: Work


def scan_work(tokens: int, d_inner: int, d_state: int, element_size: int) -> Passes:
    """The gated selective scan, its parameters (A, D, the bias of Δ) left out.

    Forward: u, Δ, z, B and C are read, y is written; for each token, channel and state an
    exponential, and 6 operations (Δ·A, (Δu)·B, a multiply-add into the state and one with C); for
    each token and channel the exponentials of softplus and SiLU, and 4 operations (Δ·u, the skip's
    multiply-add, the gate).

    Backward: these and y's gradient are read, five gradients are written. States are not kept, as
    they are ``d_state`` times an activation: the exponentials and 4 operations that make them come
    again. Then for each state: the adjoint's multiply-add and its input (3), the sums for the
    gradients of C, B and Δu (2 each), a·h·g (1), and its sums for Δ and A (2 each), together 18
    with the 4; for each channel 11 for the gradients of u, Δ, z and D.
    """
    wide, narrow = tokens * d_inner * element_size, tokens * d_state * element_size
    exponentials = tokens * d_inner * (d_state + 2)
    return Passes(
        Work(4 * wide + 2 * narrow, 0, tokens * d_inner * (6 * d_state + 4), exponentials),
        Work(7 * wide + 4 * narrow, 0, tokens * d_inner * (18 * d_state + 11), exponentials),
    )


def conv_work(tokens: int, channels: int, width: int, element_size: int) -> Passes:
    """The depthwise convolution with bias and SiLU, its taps left out.

    Forward x is read and y written; backward x and y's gradient are read, x's is written, and the
    sum before SiLU is made again, beside the sums for the gradients of x and of the taps.
    """
    wide, taps = tokens * channels * element_size, 2 * tokens * channels * width
    return Passes(
        Work(2 * wide, flops=taps, exponentials=tokens * channels),
        Work(3 * wide, flops=3 * taps, exponentials=tokens * channels),
    )


def attention_work(
    sequences: int,
    length: int,
    heads: int,
    groups: int,
    head_dim: int,
    window: int | None,
    element_size: int,
) -> Passes:
    """Attention of ``sequences`` alike; of the softmax only its exponentials are counted.

    Forward: queries, keys and values are read, the output is written; two products. Backward: these
    and the output's gradient are read, three gradients are written; five products, one of them the
    scores again.
    """
    tokens = sequences * length
    queries = tokens * heads * head_dim * element_size
    keys = tokens * groups * head_dim * element_size
    pairs = sequences * attended_pairs(length, window) * heads
    product = 2 * pairs * head_dim
    return Passes(
        Work(2 * queries + 2 * keys, 2 * product, exponentials=pairs),
        Work(3 * queries + 4 * keys, 5 * product, exponentials=pairs),
    )


def swiglu_work(tokens: int, width: int, element_size: int) -> Passes:
    """SwiGLU of ``width`` outputs: gate and up are read, and backward the output's gradient too;
    the output, or the gradients of both, are written.

    Forward 2 products and one division a number; backward two products more for each gradient and
    two for SiLU's derivative, beside the division.
    """
    numbers = tokens * width
    return Passes(
        Work(3 * numbers * element_size, flops=3 * numbers, exponentials=numbers),
        Work(5 * numbers * element_size, flops=7 * numbers, exponentials=numbers),
    )


def rms_norm_work(tokens: int, width: int, element_size: int) -> Passes:
    """RMSNorm alone: its input is read and the output written; backward the input and the output's
    gradient are read, and the input's gradient is written.

    Forward two operations a number for the mean square and two for the result; backward three
    products, a sum of products each for the row and for the weight, and the row's correction.
    """
    numbers = tokens * width
    return Passes(
        Work(2 * numbers * element_size, flops=4 * numbers),
        Work(3 * numbers * element_size, flops=9 * numbers),
    )


def rotary_work(tokens: int, heads: int, groups: int, head_dim: int, element_size: int) -> Passes:
    """The rotary embedding with the split of the joined projection before it: the projection is
    read, queries, keys and values are written; backward their gradients are read and the
    projection's is written. Angles, their sines and cosines are left out.

    Two products and a sum for each number of a query or a key, in either direction.
    """
    moved = 2 * tokens * (heads + 2 * groups) * head_dim * element_size
    turned = 3 * tokens * (heads + groups) * head_dim
    return Passes(Work(moved, flops=turned), Work(moved, flops=turned))


def linear_cross_entropy_work(
    tokens: int, width: int, vocabulary: int, element_size: int
) -> Passes:
    """Head and loss, their logits never written out: three products and one exponential a logit.

    Forward hidden states and weight are read; backward they are read and their gradients written.
    """
    operands = (tokens + vocabulary) * width * element_size
    product = 2 * tokens * width * vocabulary
    return Passes(
        Work(operands, product, exponentials=tokens * vocabulary),
        Work(2 * operands, 2 * product),
    )


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


LOGITS_BYTES = 256 << 20
"""What the chunked head and loss holds of logits at once."""
_LEAST_TOKENS = 1024
"""Of a chunk, whatever the vocabulary: each chunk reads and writes the sum of the weight's gradient
in fp32, 8 bytes a weight, for 2 operations a weight and token, so that a GPU which does about 250
operations a byte would wait for its memory with fewer."""
_WHOLE_TILES = 128


def chunk_tokens(tokens: int, vocabulary: int, element_size: int) -> int:
    """Tokens whose logits the chunked head and loss holds at once.

    As many as :data:`LOGITS_BYTES` have room for, but not under 1024; then the chunks are made
    alike long.

    Args:
        tokens: of a micro-batch on a rank.
        vocabulary: columns of the rank's logits.
        element_size: bytes of a logit.
    """
    most = max(LOGITS_BYTES // (vocabulary * element_size), _LEAST_TOKENS)
    most -= most % _WHOLE_TILES
    alike = -(-tokens // -(-tokens // most)) if tokens else 1
    return min(-(-alike // _WHOLE_TILES) * _WHOLE_TILES, max(tokens, 1))
