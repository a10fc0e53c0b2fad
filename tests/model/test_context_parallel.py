"""A model over sequences that several ranks share computes what it does on one."""

import json

import pytest

from tests.model.context_ranks import CASES, PACKINGS
from tests.ranks import run_ranks


@pytest.mark.timeout(600)
def test_logits_and_gradients_equal_one_process() -> None:
    """In fp64 to 1e-12, for every kind of layer, windows shorter and longer than a rank's piece,
    one document and several, with recomputation, and a loss that counts unequally many positions
    on the ranks."""
    said = run_ranks("tests.model.context_ranks", 4, timeout=580)
    found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert [case["case"] for case in found] == list(CASES)
    for case in found:
        assert case["packings"] > PACKINGS  # and the one without documents
        assert len(case["errors"]) > 40
        for name, error in case["errors"].items():
            assert error < 1e-12, f"{case['case']}: {name} is off by {error}"
