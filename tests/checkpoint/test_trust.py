"""Which checkpoints Transformer Engine is told to trust: its FP8 state may be a pickle."""

from pathlib import Path

from tests.ranks import run_ranks


def test_a_run_trusts_its_own_checkpoints_also_when_it_goes_back(tmp_path: Path) -> None:
    said = run_ranks("tests.checkpoint.trust_rank", 1, tmp_path)
    assert "told: nothing, 1, 1" in said, "another run's; gone back to; resumed from"
