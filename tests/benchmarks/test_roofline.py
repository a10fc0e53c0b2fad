"""Floors by hand: which of a device's rates bounds a pass, and by how much."""

import pytest

from samba_megatron.benchmarks.results import kernel_row
from samba_megatron.benchmarks.roofline import (
    Peaks,
    floor_of_both,
    floor_of_pass,
    measured_peaks,
    stated_peaks,
)
from samba_megatron.ops.cost import Passes, Work, attention_work, scan_work

PEAKS = Peaks(bytes=100, products=1000, flops=50, exponentials=10)


@pytest.mark.parametrize(
    ("work", "seconds", "bound"),
    [
        (Work(bytes=300, products=100, flops=50, exponentials=10), 3.0, "bytes"),
        (Work(bytes=300, products=4000, flops=50, exponentials=10), 4.0, "products"),
        (Work(bytes=300, products=4000, flops=250, exponentials=10), 5.0, "flops"),
        (Work(bytes=300, products=4000, flops=250, exponentials=60), 6.0, "exponentials"),
    ],
)
def test_a_pass_takes_what_takes_longest(work: Work, seconds: float, bound: str) -> None:
    floor = floor_of_pass(work, PEAKS)
    assert (floor.seconds, floor.bound) == (seconds, bound)


def test_passes_follow_one_another() -> None:
    """3 s of bytes and then 5 s of other operations, though together bytes take 6 s."""
    passes = Passes(Work(300, flops=50), Work(300, flops=250))
    floor = floor_of_both(passes, PEAKS)
    assert (floor.seconds, floor.bound) == (3.0 + 5.0, "flops")


def test_what_is_not_known_bounds_nothing() -> None:
    floor = floor_of_pass(Work(300, 100, 10**9, 10**9), measured_peaks(100, 1000))
    assert (floor.seconds, floor.bound) == (3.0, "bytes")


def test_the_scan_of_1_3b_on_an_h100() -> None:
    """Forward it is bound by its exponentials: N + 2 a channel and token, 4.2 million a µs."""
    peaks = stated_peaks("NVIDIA H100 80GB HBM3", "bf16")
    assert peaks is not None and peaks.source == "stated"
    passes = scan_work(1000, 4608, 16, 2)
    forward = floor_of_pass(passes.forward, peaks)
    assert forward.seconds == pytest.approx(1000 * 4608 * 18 / 4.2e12)
    assert forward.bound == "exponentials"
    assert passes.forward.bytes / 3.35e12 < forward.seconds
    both = floor_of_both(passes, peaks)
    assert both.seconds == pytest.approx(forward.seconds + 1000 * 4608 * (18 * 16 + 11) / 67e12)


def test_attention_in_the_window_on_an_h100() -> None:
    """18 heads of 128, 4096 positions, window 2048: bound by 2 products forward, 5 backward."""
    peaks = stated_peaks("NVIDIA H100 80GB HBM3", "bf16")
    assert peaks is not None
    pairs = 2048 * 2049 // 2 + 2048 * 2048
    floor = floor_of_both(attention_work(8, 4096, 18, 18, 128, 2048, 2), peaks)
    assert floor.bound == "products"
    assert floor.seconds == pytest.approx(7 * 8 * 18 * pairs * 2 * 128 / 989e12)


def test_no_floor_is_stated_for_a_cpu() -> None:
    assert stated_peaks("CPU (x86_64, 1 threads)", "fp32") is None


def test_a_row_has_its_rates_and_shares() -> None:
    forward, backward = Work(200, 100, 20, 5), Work(400, 100, 100, 5)
    row = kernel_row(
        {
            "forward_ms": [4000.0, 3000.0, 5000.0],
            "both_ms": [16000.0, 15000.0, 17000.0],
            "forward_work": vars(forward),
            "backward_work": vars(backward),
        },
        PEAKS,
    )
    assert row["forward_share_of_floor"] == 2.0 / 4.0
    assert row["both_share_of_floor"] == (2.0 + 4.0) / 16.0
    assert row["forward_bytes_per_second"] == 200 / 4.0
    assert row["both_bytes_per_second"] == 600 / 16.0
    assert row["both_flops_per_second"] == (200 + 120 + 10) / 16.0
    assert row["both_bound"] == "bytes"
    assert "forward_work" not in row
