"""The Mamba mixer against a slow fp64 reference under tensor and sequence parallelism."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.timeout(300)
def test_mixer_equals_fp64_reference() -> None:
    """Output and every gradient, TP 1, 2 and 4, with and without sequence parallelism."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "4", str(HERE / "mixer_ranks.py")),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr.split("failed (exitcode:")[0][-4000:]
    cases = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [(case["tp"], case["sp"]) for case in cases] == [
        (1, False),
        (2, False),
        (2, True),
        (4, False),
        (4, True),
    ]
    for case in cases:
        assert len(case["errors"]) == 11  # output, input and nine parameters
        for name, error in case["errors"].items():
            assert error < 1e-12, f"TP {case['tp']} SP {case['sp']}: {name} is off by {error}"
