"""On two GPUs over NCCL: sequences shared by two ranks give the losses of one.

In fp32 as near as kernels and sums in another order allow, in bf16 and FP8 by their formats.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from samba_megatron.tracking.metrics import read_metrics
from tests.distributed.toy import (
    launch,
    losses,
    toy_config,
    write_dataset,
    write_short_documents,
)
from tests.gpu.test_backends import BF16, FP32, LOCAL, WIDE, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
FULL = {"parallel.recompute_granularity": "full"}
SELECTIVE = {
    "parallel.recompute_granularity": "selective",
    "parallel.recompute_modules": ["mamba", "attention"],
}
# Of 256 positions a rank has 128: the window of WIDE ends in them, this one reaches further.
LONG_WINDOW = {"model.window_size": 192}
DOCUMENTS = {"data.reset_at_document_boundaries": True}
FP8 = {"precision.fp8": "hybrid", "precision.fp8_recipe": "delayed"}
RUNS: dict[str, tuple[dict[str, Any], float]] = {
    "local_fp32": ({**FP32, **LOCAL}, 1e-5),
    "local_fp32_long_window": ({**FP32, **LOCAL, **LONG_WINDOW}, 1e-5),
    "local_fp32_documents": ({**FP32, **LOCAL, **DOCUMENTS}, 1e-5),
    "te_bf16": (BF16, 2e-3),
    "te_bf16_full_attention": (
        {**BF16, **FULL, "model.hybrid_layer_pattern": "M-*- M-F-"},
        2e-3,
    ),
    "te_bf16_documents": ({**BF16, **DOCUMENTS, **LONG_WINDOW}, 2e-3),
    "te_bf16_documents_selective": ({**BF16, **DOCUMENTS, **SELECTIVE}, 2e-3),
    "te_fp8": ({**BF16, **FP8}, 3e-2),
}
"""Name → (what is set, the difference that is allowed)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run on one GPU, and shared by two."""
    folder = tmp_path_factory.mktemp("context")
    plain, short = write_dataset(folder), write_short_documents(folder)
    for ranks in (1, 2):
        specs = []
        for name, (fields, _) in RUNS.items():
            prefix = short if DOCUMENTS.items() <= fields.items() else plain
            config = toy_config(prefix, folder / f"{name}-{ranks}", **{**WIDE, **fields})
            config["parallel.context_parallel_size"] = ranks
            specs.append({"name": f"{name}-{ranks}", "config": config})
        launch(ranks, specs, folder)
    return folder


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", RUNS)
def test_losses_equal_one_gpu(folder: Path, name: str) -> None:
    """The curves stay together over 20 steps."""
    difference = worst(losses(folder / f"{name}-2"), losses(folder / f"{name}-1"))
    allowed = RUNS[name][1]
    print(f"{name}: {difference:.2e} (allowed {allowed:.0e})")
    assert difference <= allowed


def test_the_fused_scan_and_our_attention_ran(folder: Path) -> None:
    """Transformer Engine's attention would share sequences in its own way."""
    start = read_metrics(folder / "te_bf16-2" / "metrics.jsonl", "start")[-1]
    print(start["kernels"])
    assert start["kernels"]["selective_scan"] == "fused"
    assert start["kernels"]["attention"] != "transformer_engine"
