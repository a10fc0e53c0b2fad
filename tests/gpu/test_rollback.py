"""On a GPU: a run goes back to a checkpoint of its own, whatever its weights are kept in."""

from pathlib import Path
from typing import Any

import pytest
import torch

from samba_megatron.tracking import ledger
from tests.distributed.test_spikes import samples_of
from tests.distributed.toy import launch, losses, toy_config, write_dataset
from tests.gpu.test_backends import BF16, WIDE
from tests.training.rehearsal import GRAPHED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(900),
]
FP8: dict[str, Any] = {**BF16, "precision.fp8": "hybrid"}
DELAYED: dict[str, Any] = {**FP8, "precision.fp8_recipe": "delayed"}
KEPT: dict[str, Any] = {"precision.fp8_param_gather": True}
KINDS = {
    "bf16_graph": {**BF16, **GRAPHED},
    "delayed": DELAYED,
    "delayed_kept": {**DELAYED, **KEPT},
    "delayed_graph": {**DELAYED, **GRAPHED},
    "tensorwise_kept": {**FP8, **KEPT},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_back_and_a_resumed_run_is_the_same(kind: str, tmp_path: Path) -> None:
    """Steps 7 and 8 are not a number: back to step 4, and stopped twice in the other run."""
    prefix = write_dataset(tmp_path)
    fields: dict[str, Any] = {
        "training.train_steps": 14,
        "checkpoint.save_interval": 2,
        "checkpoint.keep_last": 0,
        "faults.skip_spikes": True,
        "faults.max_skips_in_row": 2,
        **KINDS[kind],
    }

    def spec(name: str, exit_step: int | None = None) -> dict[str, Any]:
        config = toy_config(prefix, tmp_path / name, **WIDE, **fields)
        return {
            "name": name,
            "config": {**config, "training.exit_step": exit_step},
            "nan": samples_of(7, 8),
            "exit_code": 75 if exit_step else 0,
        }

    parts = [spec("parts", 7), spec("parts", 10), spec("parts")]
    launch(1, [spec("whole"), *parts], tmp_path, "run_on_bad_data")
    for name in ("whole", "parts"):
        (back,) = ledger.read(tmp_path / name, "rollback")
        assert (back["from_step"], back["step"]) == (8, 4)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
