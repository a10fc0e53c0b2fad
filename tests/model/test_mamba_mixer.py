"""The Mamba mixer against a slow fp64 reference under tensor and sequence parallelism."""

import json

import pytest

from tests.ranks import run_ranks


@pytest.mark.timeout(300)
def test_mixer_equals_fp64_reference() -> None:
    """Output and every gradient, TP 1, 2 and 4, with and without sequence parallelism."""
    said = run_ranks("tests.model.mixer_ranks", 4, timeout=280)
    cases = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
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
