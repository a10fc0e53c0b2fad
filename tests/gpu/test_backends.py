"""On a GPU: Transformer Engine against the local backend against the CPU, from one seed.

Initial weights depend on the seed alone, so the same toy run is started on each and the losses
are compared step by step. fp32 runs differ by the order of sums only (TF32 is off; Transformer
Engine's fp32 kernels round a little more), bf16 and FP8 by their number formats. Tolerances are a
few times what an H200 gave.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from samba_megatron.config.parallel import RECOMPUTABLE_PARTS
from samba_megatron.tracking.metrics import read_metrics
from tests.distributed.toy import launch, losses, toy_config, write_dataset

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

WIDE = {
    # Head dimension 64 for the fused attention kernels; all matrix dimensions multiples of 16.
    "model.hidden_size": 128,
    "model.ffn_hidden_size": 256,
    "model.num_attention_heads": 2,
    "model.num_query_groups": 1,
    "model.window_size": 96,
    "data.sequence_length": 256,
    "training.micro_batch_size": 4,
    "training.global_batch_size": 8,
    "optimizer.lr": 2e-3,
}
FP32 = {"precision.params_dtype": "fp32"}
BF16 = {"precision.params_dtype": "bf16"}
LOCAL = {"kernels.transformer_impl": "local", "optimizer.adam_impl": "torch"}
CHUNKED = {"kernels.cross_entropy": "chunked"}
OWN_NORM = {"kernels.rms_norm": "triton"}
OWN_ROTARY = {"kernels.rotary": "triton"}
FP8 = {"precision.fp8": "hybrid", "precision.fp8_recipe": "tensorwise"}
TORCH_OPS = {
    "kernels.selective_scan": "torch",
    "kernels.causal_conv1d": "torch",
    "kernels.windowed_attention": "torch",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """Losses of the same toy run on every backend."""
    folder = tmp_path_factory.mktemp("backends")
    prefix = write_dataset(folder)

    def spec(name: str, **fields: Any) -> dict[str, Any]:
        return {"name": name, "config": toy_config(prefix, folder / name, **WIDE, **fields)}

    on_gpu = [
        spec("local_fp32", **FP32, **LOCAL, **TORCH_OPS),
        spec("local_kernels_fp32", **FP32, **LOCAL),
        spec("local_bf16", **BF16, **LOCAL),
        spec("te_fp32", **FP32),
        spec("te_bf16", **BF16),
        spec("local_chunked_fp32", **FP32, **LOCAL, **CHUNKED),
        spec("te_bf16_chunked", **BF16, **CHUNKED),
        spec("te_bf16_own_norm", **BF16, **OWN_NORM),
        spec("te_fp8_own_norm", **BF16, **FP8, **OWN_NORM),
        spec("local_own_rotary_fp32", **FP32, **LOCAL, **OWN_ROTARY),
        spec("te_bf16_own_rotary", **BF16, **OWN_ROTARY),
        spec("te_bf16_recompute", **BF16, **{"parallel.recompute_granularity": "full"}),
        spec(
            "te_bf16_selective",
            **BF16,
            **{
                "parallel.recompute_granularity": "selective",
                "parallel.recompute_modules": ["mamba", "mlp"],
            },
        ),
        spec(
            "te_bf16_parts",
            **BF16,
            **{
                "parallel.recompute_granularity": "selective",
                "parallel.recompute_modules": list(RECOMPUTABLE_PARTS),
            },
        ),
        *(
            spec(
                f"te_fp8_{recipe}",
                **BF16,
                **{"precision.fp8": "hybrid", "precision.fp8_recipe": recipe},
            )
            for recipe in ("delayed", "tensorwise", "blockwise")
        ),
    ]
    launch(1, on_gpu, folder)
    cpu = [spec("cpu_fp32", **FP32)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        launch(1, cpu, folder)
    finally:
        if visible is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
    for name in [*(s["name"] for s in on_gpu), "cpu_fp32"]:
        start = read_metrics(Path(folder) / name / "metrics.jsonl", "start")[-1]
        print(name, start["kernels"])
    return {s["name"]: losses(folder / s["name"]) for s in [*on_gpu, *cpu]}


def worst(a: list[float], b: list[float]) -> float:
    """Largest difference of two loss curves."""
    assert len(a) == len(b) > 0
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def assert_together(runs: dict[str, list[float]], name: str, other: str, tolerance: float) -> None:
    """The curves of two runs stay together over 20 steps."""
    difference = worst(runs[name], runs[other])
    print(f"{name} against {other}: {difference:.2e} (allowed {tolerance:.0e})")
    assert difference <= tolerance


@pytest.mark.parametrize(
    ("name", "other", "tolerance"),
    [
        ("local_fp32", "cpu_fp32", 1e-5),
        ("local_kernels_fp32", "local_fp32", 1e-5),
        ("te_fp32", "local_fp32", 2e-4),
        ("local_bf16", "local_fp32", 1e-2),
        ("te_bf16", "local_bf16", 2e-3),
        ("local_chunked_fp32", "local_kernels_fp32", 1e-5),
        ("te_bf16_chunked", "te_bf16", 2e-3),
        ("te_bf16_own_norm", "te_bf16", 2e-3),
        ("te_fp8_own_norm", "te_fp8_tensorwise", 3e-2),
        ("local_own_rotary_fp32", "local_kernels_fp32", 1e-5),
        ("te_bf16_own_rotary", "te_bf16", 2e-3),
        ("te_bf16_recompute", "te_bf16", 2e-3),
        ("te_bf16_selective", "te_bf16", 2e-3),
        ("te_bf16_parts", "te_bf16", 2e-3),
        ("te_fp8_delayed", "te_bf16", 3e-2),
        ("te_fp8_tensorwise", "te_bf16", 3e-2),
        ("te_fp8_blockwise", "te_bf16", 3e-2),
    ],
)
def test_losses_agree(
    runs: dict[str, list[float]], name: str, other: str, tolerance: float
) -> None:
    assert_together(runs, name, other, tolerance)
