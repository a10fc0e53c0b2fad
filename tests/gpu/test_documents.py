"""On a GPU: documents stay apart in Transformer Engine's layers with the fast kernels.

To the bit in bf16: attention by Transformer Engine and by flash-attn, the fused scan, and
causal-conv1d. In FP8 tensors share their scales, so there only the losses are compared.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from samba_megatron.config import ParallelConfig
from samba_megatron.ops.backends import last_backends
from tests.distributed.toy import launch, losses, toy_config, write_short_documents
from tests.gpu.test_backends import BF16, FP32, LOCAL, TORCH_OPS, WIDE, assert_together, worst
from tests.model.documents_ranks import FULL, SELECTIVE, layout
from tests.model.isolation import Packing, Trial, packings, toy_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SIZES = {"hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 2}
FAST = {"selective_scan": "fused", "causal_conv1d": "causal_conv1d"}
NOISE = 1e-3
"""causal-conv1d adds up the gradients of its taps in any order."""


@pytest.mark.parametrize(
    ("implementation", "attention", "parallel"),
    [
        ("transformer_engine", "transformer_engine", {}),
        ("transformer_engine", "flash_attn", {}),
        ("transformer_engine", "flash_attn", FULL),
        ("transformer_engine", "flash_attn", SELECTIVE),
        ("local", "flash_attn", {}),
    ],
    ids=["te", "te-flash", "te-flash-full", "te-flash-selective", "local"],
)
def test_a_document_does_not_touch_another(
    implementation: Any, attention: str, parallel: dict[str, Any]
) -> None:
    """Not a bit of outputs, losses and gradients."""
    settled, kernels = ParallelConfig(**parallel), {**FAST, "windowed_attention": attention}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with layout(settled):
            trial = Trial(
                toy_run(kernels, settled, num_query_groups=1, **SIZES), implementation, noise=NOISE
            )

            @settings(max_examples=15, deadline=None, derandomize=True, database=None)
            @given(packings())
            def hold(packing: Packing) -> None:
                leaks = trial.leaks(packing)
                assert not leaks, leaks

            hold()
    finally:
        torch.use_deterministic_algorithms(False)
    ran = last_backends()
    assert {name: ran[name] for name in kernels} == kernels


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of the same toy run over short documents on every backend."""
    folder = tmp_path_factory.mktemp("documents")
    prefix = write_short_documents(folder)

    def spec(name: str, **fields: Any) -> dict[str, Any]:
        config = toy_config(prefix, folder / name, **WIDE, **fields)
        config["data.reset_at_document_boundaries"] = not name.endswith("together")
        return {"name": name, "config": config}

    fp8 = {**BF16, "precision.fp8": "hybrid", "precision.fp8_recipe": "delayed"}
    on_gpu = [
        spec("local_fp32", **FP32, **LOCAL, **TORCH_OPS),
        spec("local_fp32_together", **FP32, **LOCAL, **TORCH_OPS),
        spec("te_fp32", **FP32),
        spec("te_bf16", **BF16),
        spec("te_bf16_recompute", **BF16, **{"parallel.recompute_granularity": "full"}),
        spec("te_fp8", **fp8),
        spec("te_fp8_recompute", **fp8, **{"parallel.recompute_granularity": "full"}),
    ]
    launch(1, on_gpu, folder)
    cpu = [spec("cpu_fp32", **FP32)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "")
        launch(1, cpu, folder)
    return {s["name"]: losses(Path(folder) / s["name"]) for s in [*on_gpu, *cpu]}


@pytest.mark.parametrize(
    ("name", "other", "tolerance"),
    [
        ("local_fp32", "cpu_fp32", 1e-5),
        ("te_fp32", "local_fp32", 2e-4),
        ("te_bf16", "local_fp32", 1e-2),
        ("te_bf16_recompute", "te_bf16", 2e-3),
        ("te_fp8", "te_bf16", 3e-2),
        ("te_fp8_recompute", "te_fp8", 3e-2),
    ],
)
def test_losses_agree(
    runs: dict[str, list[float]], name: str, other: str, tolerance: float
) -> None:
    assert_together(runs, name, other, tolerance)


def test_documents_matter_in_this_run(runs: dict[str, list[float]]) -> None:
    """Otherwise the comparisons would hold whatever the kernels do with documents."""
    assert worst(runs["local_fp32"], runs["local_fp32_together"]) > 1e-2
