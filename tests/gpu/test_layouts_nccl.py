"""On several GPUs over NCCL: losses do not depend on the layout, and a run moves between layouts.

The layouts of tests/distributed/test_layouts.py, as far as the machine's GPUs reach, with
Transformer Engine, the fused scan, documents apart, gradients accumulated inside the matrix
products and reduced in the background. In fp32 as near as sums in another order allow, in bf16 and
FP8 by their formats.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.test_layouts import LAYOUTS
from tests.distributed.toy import (
    STEPS,
    launch,
    losses,
    toy_config,
    write_short_documents,
)
from tests.gpu.test_backends import BF16, FP8, FP32, LOCAL, WIDE, worst

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason="needs two GPUs"),
    pytest.mark.timeout(900),
]
NAMES = [
    name
    for name in (
        *("dp2", "dp2_no_overlap", "tp2_sp_recompute", "pp2_vpp2", "cp2"),
        *("tp2_pp2_sp", "tp2_dp2", "cp2_tp2_sp", "cp2_pp2", "chunked_pp2_dp2"),
    )
    if LAYOUTS[name][0] <= GPUS
]
FORMATS: dict[str, tuple[dict[str, Any], float]] = {
    "fp32": ({**FP32, **LOCAL}, 1e-5),
    "bf16": (BF16, 2e-3),
    "fp8": ({**BF16, **FP8}, 3e-2),
}
"""Name → (what is set, the difference that is allowed)."""
OTHERS = ("dp2", "tp2_pp2_sp", "cp2_tp2_sp")
"""Layouts that run in fp32 and FP8 too."""
CASES = [(label, name) for label in FORMATS for name in NAMES if label == "bf16" or name in OTHERS]
HALF = STEPS // 2
MOVES = [(a, b) for a, b in (("pp2_vpp2", "dp2"), ("tp2_pp2_sp", "dp2")) if a in NAMES]
"""Saved half-way in the first layout, resumed in the second."""
PARTED = {
    **WIDE,
    "model.num_query_groups": 2,
    "data.reset_at_document_boundaries": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run of every layout, and the moves in bf16."""
    folder = tmp_path_factory.mktemp("layouts")
    prefix = write_short_documents(folder)

    def spec(name: str, fields: dict[str, Any], **more: Any) -> dict[str, Any]:
        config = toy_config(prefix, folder / name, **{**PARTED, **fields})
        return {"name": name, "config": config, **more}

    worlds: dict[int, list[dict[str, Any]]] = {}
    for label, (fields, _) in FORMATS.items():
        worlds.setdefault(1, []).append(spec(f"{label}-one", fields))
        for name in (name for each, name in CASES if each == label):
            processes, layout = LAYOUTS[name]
            worlds.setdefault(processes, []).append(spec(f"{label}-{name}", {**fields, **layout}))
    stop = {"checkpoint.save_interval": HALF, "training.exit_step": HALF}
    for first, second in MOVES:
        name = f"{first}-to-{second}"
        processes, fields = LAYOUTS[first]
        worlds[processes].append(spec(name, {**BF16, **fields, **stop}, exit_code=75))
        processes, fields = LAYOUTS[second]
        worlds[processes].append(spec(name, {**BF16, **fields}))
    # Larger worlds first: what they save is what smaller ones go on with.
    for processes in sorted(worlds, reverse=True):
        launch(processes, worlds[processes], folder)
    return folder


@pytest.mark.parametrize(("label", "name"), CASES)
def test_losses_equal_one_gpu(folder: Path, label: str, name: str) -> None:
    """The curves stay together over 20 steps."""
    difference = worst(losses(folder / f"{label}-{name}"), losses(folder / f"{label}-one"))
    allowed = FORMATS[label][1]
    print(f"{name}, {label}: {difference:.2e} (allowed {allowed:.0e})")
    assert difference <= allowed


@pytest.mark.parametrize(("first", "second"), MOVES)
def test_a_run_that_moves_is_the_run_that_stayed(folder: Path, first: str, second: str) -> None:
    difference = worst(losses(folder / f"{first}-to-{second}"), losses(folder / "bf16-one"))
    print(f"{first} to {second}: {difference:.2e}")
    assert difference <= FORMATS["bf16"][1]
