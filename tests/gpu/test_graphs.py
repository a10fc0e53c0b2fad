"""On a GPU: a step replayed as one CUDA graph gives what its kernels give one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.toy import launch, losses, toy_config, write_short_documents
from tests.gpu.test_backends import BF16, CHUNKED, FP8, LOCAL, OWN_NORM, OWN_ROTARY, WIDE
from tests.training.rehearsal import GRAPHED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(900),
]

APART = {"data.reset_at_document_boundaries": True}
VALIDATED = {
    "validation.eval_interval": 5,
    "validation.eval_tokens": 2048,
    "data.split": "90,10,0",
}
KINDS: dict[str, dict[str, Any]] = {
    "bf16": BF16,
    "bf16_apart": {**BF16, **APART},
    "bf16_one_row": {**BF16, **APART, "training.micro_batch_size": 1},
    "bf16_own_kernels": {**BF16, **APART, **OWN_NORM, **OWN_ROTARY, **CHUNKED},
    "bf16_parts": {
        **BF16,
        **APART,
        "parallel.recompute_granularity": "selective",
        "parallel.recompute_modules": ["mlp_act", "layernorm", "conv1d", "dt_proj", "scan"],
    },
    "local_bf16": {**BF16, **LOCAL, **APART},
    "fp8_tensorwise": {**BF16, **FP8, **APART},
    "fp8_delayed": {**BF16, **FP8, **APART, "precision.fp8_recipe": "delayed"},
    "fp8_blockwise": {**BF16, **FP8, **APART, "precision.fp8_recipe": "blockwise"},
    "ramp": {
        **BF16,
        **APART,
        "training.rampup_start_batch_size": 4,
        "training.rampup_batch_size_increment": 4,
        "training.rampup_tokens": 6 * 4 * 256,
    },
    "validated": {**BF16, **APART, **VALIDATED},
    "fp8_validated": {**BF16, **FP8, **APART, **VALIDATED},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each kind's run, launched and replayed."""
    folder = tmp_path_factory.mktemp("graphs")
    prefix = write_short_documents(folder)
    specs = [
        {
            "name": f"{kind}_{how}",
            "config": toy_config(
                prefix, folder / f"{kind}_{how}", **{**WIDE, "training.seed": 1, **fields, **more}
            ),
        }
        for kind, fields in KINDS.items()
        for how, more in (("launched", {}), ("replayed", GRAPHED))
    ]
    launch(1, specs, folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_is_the_step(folder: Path, kind: str) -> None:
    launched, replayed = (losses(folder / f"{kind}_{how}") for how in ("launched", "replayed"))
    difference = max(abs(x - y) for x, y in zip(launched, replayed, strict=True))
    print(f"{kind}: {difference:.2e}")
    assert difference == 0.0


@pytest.mark.parametrize("kind", ["validated", "fp8_validated"])
def test_validations_between_are_the_same(folder: Path, kind: str) -> None:
    launched, replayed = (
        losses(folder / f"{kind}_{how}", "validation") for how in ("launched", "replayed")
    )
    assert launched == replayed and len(launched) == 3
