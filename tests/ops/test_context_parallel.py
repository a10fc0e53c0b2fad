"""Operations over a sequence that several ranks share: exact, and as cheap to send as said."""

import json
from typing import Any

import pytest
import torch

from samba_megatron.ops import cost
from samba_megatron.ops.context_parallel import carry_between, own_positions
from tests.ops.sharded_ranks import (
    CHANNELS,
    COUNTED,
    EXAMPLES,
    HEAD_DIM,
    KV_HEADS,
    STATES,
)
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What four processes found: cases of two and four ranks, drawn; bytes sent."""
    said = run_ranks("tests.ops.sharded_ranks", 4, timeout=280)
    last: dict[str, Any] = json.loads(said.splitlines()[-1])
    return last


@pytest.mark.timeout(300)
def test_ranks_compute_what_one_process_does(report: dict[str, Any]) -> None:
    """Convolution, attention and scan, and all their gradients, to 1e-12 in fp64: windows shorter
    and longer than a rank's positions and none, documents anywhere. The processes assert it."""
    assert report["cases"] >= EXAMPLES


def test_bytes_sent_are_those_that_are_said(report: dict[str, Any]) -> None:
    """Of the busiest rank, forward and backward."""
    ranks, length, batch = COUNTED["ranks"], COUNTED["length"], COUNTED["batch"]
    fp64 = 8
    expected = {
        "conv": cost.halo_bytes(ranks, length, COUNTED["width"] - 1, batch * CHANNELS, fp64),
        "attention": cost.halo_bytes(
            ranks, length, COUNTED["window"] - 1, 2 * batch * KV_HEADS * HEAD_DIM, fp64
        ),
        "scan": cost.carry_bytes(ranks, batch, CHANNELS, STATES) * fp64 // 4,
    }
    assert report["bytes"] == {
        f"{name}_{way}": size for name, size in expected.items() for way in ("forward", "backward")
    }


def test_a_rank_alone_has_the_whole_sequence() -> None:
    whole = torch.arange(6)
    assert own_positions(whole, None) is whole
    assert carry_between(None) is None
