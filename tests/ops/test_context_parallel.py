"""Operations over a sequence that several ranks share: exact, and as cheap to send as said."""

import json
import os
import subprocess
import sys
from pathlib import Path
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

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four processes found: cases of two and four ranks, drawn; bytes sent."""
    log = tmp_path_factory.mktemp("sharded") / "log"
    program = [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")]
    with open(log, "w") as out:
        result = subprocess.run(
            [*program, "4", str(HERE / "sharded_ranks.py")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)},
            stdout=out,
            stderr=out,
            timeout=280,
        )
    said = log.read_text()
    assert result.returncode == 0, said.split("failed (exitcode:")[0][-6000:]
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
