"""The planner against steps measured on one GPU: memory within 10 %, time within 15 %."""

import json
from pathlib import Path
from typing import Any

import pytest

from samba_megatron.config import RunConfig
from samba_megatron.config.load import parse_run_config
from samba_megatron.planning.plan import judge
from samba_megatron.platform.hardware import gpu_in

MEASURED: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("measured_steps.json").read_text()
)
PRECISIONS = {
    "bf16": [],
    "fp8_tensorwise": ["--precision.fp8", "hybrid"],
    "fp8_delayed": ["--precision.fp8", "hybrid", "--precision.fp8_recipe", "delayed"],
}


def config(row: dict[str, Any]) -> RunConfig:
    size = row["micro_batch_size"]
    return parse_run_config(
        [
            *("--config", row["recipe"], *PRECISIONS[row["precision"]]),
            *("--training.micro_batch_size", str(size)),
            *("--training.global_batch_size", str(row["global_batch_size"] or size)),
            *("--data.sequence_length", str(row["sequence_length"]), *row["overrides"]),
        ]
    )


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row["name"])
def test_measured_steps_are_met(row: dict[str, Any]) -> None:
    gpu = gpu_in(row["device"])
    assert gpu is not None
    planned = judge(config(row), 1, gpu)
    assert planned.memory.total_bytes / 2**30 == pytest.approx(row["memory_gib"], rel=0.10)
    assert planned.time.total == pytest.approx(row["seconds"], rel=0.15)
