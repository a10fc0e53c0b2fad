"""A model over sequences that several ranks share computes what it does on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.context_ranks import CASES, PACKINGS

HERE = Path(__file__).parent


@pytest.mark.timeout(600)
def test_logits_and_gradients_equal_one_process(tmp_path: Path) -> None:
    """In fp64 to 1e-12, for every kind of layer, windows shorter and longer than a rank's piece,
    one document and several, with recomputation, and a loss that counts unequally many positions
    on the ranks."""
    program = [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")]
    with open(tmp_path / "log", "w") as log:
        result = subprocess.run(
            [*program, "4", str(HERE / "context_ranks.py")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)},
            stdout=log,
            stderr=log,
            timeout=580,
        )
    said = (tmp_path / "log").read_text()
    assert result.returncode == 0, said.split("failed (exitcode:")[0][-6000:]
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [case["case"] for case in found] == list(CASES)
    for case in found:
        assert case["packings"] > PACKINGS  # and the one without documents
        assert len(case["errors"]) > 40
        for name, error in case["errors"].items():
            assert error < 1e-12, f"{case['case']}: {name} is off by {error}"
