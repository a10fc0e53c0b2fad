"""The operations' costs against counts made one by one."""

import pytest

from samba_megatron.ops import cost


@pytest.mark.parametrize(
    ("length", "window"), [(1, 1), (7, None), (7, 3), (7, 7), (7, 20), (50, 8)]
)
def test_attended_pairs_are_those_of_the_mask(length, window):
    pairs = sum(
        1
        for query in range(length)
        for key in range(query + 1)
        if window is None or query - key < window
    )
    assert cost.attended_pairs(length, window) == pairs
    assert cost.attention_flops(length, 3, 16, window) == pairs * 3 * (2 * 16 + 2 * 16)


def test_flops_of_the_mixer():
    # a state: Δ·A, exp, (Δu)·B, multiply-add, multiply-add; a channel: Δ·u, multiply-add, gate
    assert cost.scan_flops(10, 6, 4) == 10 * 6 * (4 * (1 + 1 + 1 + 2 + 2) + 1 + 2 + 1)
    assert cost.conv_flops(10, 6, 4) == 10 * 6 * 4 * 2


@pytest.mark.parametrize(("ranks", "rounds"), [(2, 1), (3, 2), (4, 3), (5, 3), (8, 4), (9, 4)])
def test_bytes_of_the_state_carried_between_ranks(ranks, rounds):
    """The shift by one, then maps that span 1, 2, 4, … ranks until they span all before."""
    assert cost.carry_bytes(ranks, 2, 6, 4) == (2 * rounds - 1) * 2 * 6 * 4 * 4
    assert cost.carry_bytes(1, 2, 6, 4) == 0


def test_bytes_of_a_halo():
    assert cost.halo_bytes(4, 10, 3, 6, 2) == 3 * 6 * 2
    assert cost.halo_bytes(4, 10, 25, 6, 2) == 25 * 6 * 2  # from three ranks
    assert cost.halo_bytes(4, 10, 1000, 6, 2) == 30 * 6 * 2  # all positions of the ranks before


def test_the_least_work_of_the_scan():
    """10 tokens, 6 channels, 4 states, two bytes a number."""
    passes = cost.scan_work(10, 6, 4, 2)
    assert passes.forward.bytes == 10 * 2 * ((6 + 6 + 6) + (4 + 4) + 6)  # u, Δ, z; B, C; y
    assert passes.backward.bytes == 10 * 2 * ((4 * 6 + 2 * 4) + (3 * 6 + 2 * 4))  # in; gradients
    assert passes.forward.flops + 10 * 6 * 4 == cost.scan_flops(10, 6, 4)  # there exp is one more
    # state again 4; adjoint 3; dC, d(Δu), dB 6; a·h·g 1; dΔ, dA 4. Channel: Δ·u, gate, du 3, dΔ 2,
    # dD 2, dz 2.
    assert passes.backward.flops == 10 * 6 * (4 * (4 + 3 + 6 + 1 + 4) + 1 + 1 + 3 + 2 + 2 + 2)
    assert passes.forward.exponentials == passes.backward.exponentials == 10 * 6 * (4 + 2)
    assert passes.forward.products == passes.backward.products == 0


def test_the_least_work_of_a_norm():
    """10 rows of 6, two bytes a number."""
    passes = cost.rms_norm_work(10, 6, 2)
    assert passes.forward.bytes == 10 * 6 * 2 * (1 + 1)  # x; y
    assert passes.backward.bytes == 10 * 6 * 2 * (2 + 1)  # x, dy; dx
    # square and sum; twice a factor. Two factors, x again, two sums of products, correction 2.
    assert passes.forward.flops == 10 * 6 * 4 and passes.backward.flops == 10 * 6 * 9


def test_the_least_work_of_the_rotary_embedding():
    """10 tokens, 4 heads over 2 of keys, 16 wide, two bytes a number."""
    passes = cost.rotary_work(10, 4, 2, 16, 2)
    assert passes.forward == passes.backward
    assert passes.forward.bytes == 10 * 16 * 2 * ((4 + 2 + 2) + (4 + 2 + 2))  # joined; q, k, v
    assert passes.forward.flops == 10 * (4 + 2) * 16 * (2 + 1)  # of q and k: x cos, y sin; sum


def test_the_least_work_of_attention():
    """3 sequences of 7 in a window of 3, 4 heads over 2 of keys, 16 wide, two bytes a number."""
    passes = cost.attention_work(3, 7, 4, 2, 16, 3, 2)
    assert passes.forward.products == 3 * cost.attention_flops(7, 4, 16, 3)
    assert passes.backward.products == passes.forward.products * 5 // 2
    queries, keys = 3 * 7 * 4 * 16 * 2, 3 * 7 * 2 * 16 * 2
    assert passes.forward.bytes == (queries + keys + keys) + queries
    assert passes.backward.bytes == (queries + keys + keys + queries) + (queries + keys + keys)
    assert passes.forward.exponentials == 3 * 4 * cost.attended_pairs(7, 3)


def test_the_least_work_of_the_others():
    conv = cost.conv_work(10, 6, 4, 2)
    assert (conv.forward.bytes, conv.backward.bytes) == (10 * 6 * 2 * 2, 10 * 6 * 2 * 3)
    assert conv.forward.flops == cost.conv_flops(10, 6, 4) == conv.backward.flops // 3
    swiglu = cost.swiglu_work(10, 6, 2)
    assert (swiglu.forward.bytes, swiglu.backward.bytes) == (10 * 6 * 2 * 3, 10 * 6 * 2 * 5)
    loss = cost.linear_cross_entropy_work(10, 6, 50, 2)
    assert (loss.forward + loss.backward).products == 3 * 2 * 10 * 6 * 50
    assert (loss.forward + loss.backward).bytes == 3 * (10 * 6 + 50 * 6) * 2
