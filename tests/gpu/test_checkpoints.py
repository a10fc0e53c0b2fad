"""On a GPU: background saves resume bit for bit, and checkpoints move between the backends."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.toy import STEPS, launch, losses, toy_config, write_dataset
from tests.gpu.test_backends import BF16, FP32, LOCAL, WIDE, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
HALF = STEPS // 2
FP8 = {**BF16, "precision.fp8": "hybrid", "precision.fp8_recipe": "delayed"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs saved in the background at half way, stopped, and gone on with."""
    folder = tmp_path_factory.mktemp("moves")
    prefix = write_dataset(folder)

    def config(name: str, **fields: Any) -> dict[str, Any]:
        return toy_config(prefix, folder / name, **WIDE, **fields)

    specs: list[dict[str, Any]] = []
    moves: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "te_bf16": (BF16, BF16),
        "te_fp8": (FP8, FP8),
        "te_to_local": (FP32, {**FP32, **LOCAL}),
        "local_to_te": ({**FP32, **LOCAL}, FP32),
    }
    for name, (before, after) in moves.items():
        whole = config(f"{name}-whole", **before)
        stopped = {"checkpoint.save_interval": HALF, "training.exit_step": HALF}
        specs += [
            {"name": f"{name}-whole", "config": whole},
            {"name": name, "config": config(name, **before, **stopped), "exit_code": 75},
            {"name": name, "config": config(name, **after)},
        ]
    launch(1, specs, folder)
    return folder


@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("te_bf16", 0.0), ("te_fp8", 0.0), ("te_to_local", 2e-4), ("local_to_te", 2e-4)],
)
def test_resumed_run_equals_the_whole(folder: Path, name: str, tolerance: float) -> None:
    """All 20 losses; in the same backend not a bit may differ."""
    difference = worst(losses(folder / name), losses(folder / f"{name}-whole"))
    print(f"{name}: {difference:.2e} (allowed {tolerance:.0e})")
    assert difference <= tolerance
