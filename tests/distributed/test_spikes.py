"""Runs over bad data: steps are skipped, the run goes back, and a resumed run is the same run."""

from pathlib import Path
from typing import Any

import pytest

from samba_megatron.tracking import ledger
from samba_megatron.tracking.metrics import read_metrics
from tests.distributed.toy import launch, losses, toy_config, write_dataset

BATCH = 8
BUDGETS: dict[str, Any] = {
    "checkpoint.save_interval": 2,
    "faults.skip_spikes": True,
    "faults.max_skips_in_row": 2,
}
OVER_BUDGET: dict[str, tuple[dict[str, Any], tuple[int, ...], str]] = {
    "nowhere": ({}, (3, 4), "no checkpoint of step 0 or before"),
    "skips": ({"faults.max_skipped_steps": 0}, (4,), "max_skipped_steps"),
    "returns": ({"faults.max_rollbacks": 0}, (7, 8), "max_rollbacks 0"),
}
"""Fields, steps that are not a number, and what the reason of the end says."""


def samples_of(*steps: int) -> list[int]:
    """The samples of steps, by place; one of each step is enough to spoil it."""
    return [sample for step in steps for sample in range((step - 1) * BATCH, step * BATCH)]


@pytest.mark.timeout(600)
def test_bad_data_are_skipped_and_left_behind(tmp_path: Path) -> None:
    """Step 6 is not a number, 19 and 20 are outliers, and so are 26 to 28: then back to 20.

    Twice: at one go, and stopped in the middle of a row, and after the return. Then runs that
    end with code 76: nothing to go back to, too many skipped steps, too many returns.
    """
    prefix = write_dataset(tmp_path)
    fields: dict[str, Any] = {
        "training.train_steps": 32,
        "checkpoint.save_interval": 4,
        "checkpoint.keep_last": 0,
        "faults.skip_spikes": True,
        "faults.spike_window": 16,
        "faults.spike_zscore": 4.0,
        "faults.max_skips_in_row": 3,
        "parallel.overlap_grad_reduce": True,
        "parallel.overlap_param_gather": True,
    }
    bad = {"nan": samples_of(6)[-1:], "absurd": samples_of(19, 20, 26, 27, 28)}
    whole = {"name": "whole", "config": toy_config(prefix, tmp_path / "whole", **fields), **bad}

    def part(exit_step: int | None) -> dict[str, Any]:
        config = toy_config(prefix, tmp_path / "parts", **fields)
        code = 75 if exit_step else 0
        return {"name": f"parts to {exit_step}", "exit_code": code, **bad,
                "config": {**config, "training.exit_step": exit_step}}  # fmt: skip

    ends = [
        {
            "name": name,
            "config": toy_config(prefix, tmp_path / name, **BUDGETS, **changed),
            "nan": samples_of(*steps),
            "exit_code": 76,
        }
        for name, (changed, steps, _) in OVER_BUDGET.items()
    ]
    parts = [part(19), part(27), part(30), part(None)]
    launch(2, [whole, *parts, *ends], tmp_path, "run_on_bad_data")

    events = ledger.read(tmp_path / "whole", "skipped")
    assert [event["step"] for event in events] == [6, 19, 20, 26, 27, 28]
    assert [event["in_row"] for event in events] == [1, 1, 2, 1, 2, 3]
    assert "not finite" in events[0]["reason"] and events[0]["loss"] is None
    assert "standard deviations above the usual" in events[1]["reason"]
    (back,) = ledger.read(tmp_path / "whole", "rollback")
    assert (back["from_step"], back["step"], back["samples"]) == (28, 20, 8 * BATCH)
    metrics = tmp_path / "whole" / "metrics.jsonl"
    assert [r["step"] for r in read_metrics(metrics, "skipped")] == [6, 19, 20, 26, 27, 28]
    steps = [record["step"] for record in read_metrics(metrics, "train")]
    assert sorted(steps) == [step for step in range(1, 33) if step not in (6, 19, 20)]
    assert read_metrics(metrics, "train")[-1]["samples"] == (32 + 8) * BATCH

    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert ledger.read(tmp_path / "parts", "rollback")[0]["samples"] == 8 * BATCH

    for name, (_, _, words) in OVER_BUDGET.items():
        (end,) = ledger.read(tmp_path / name, "end")
        assert (end["code"], end["cause"]) == (76, "non-finite"), end
        assert words in end["reason"], end
        assert end["checkpoint_step"] == end["step"]
