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
