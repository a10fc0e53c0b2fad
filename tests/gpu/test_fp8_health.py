"""On a GPU: what the FP8 record counts is what Transformer Engine's casts do."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from samba_megatron.ops.fp8_format import E4M3, E5M2, Format, Scaling, lost_and_clipped, own_scale
from samba_megatron.tracking.metrics import read_metrics
from samba_megatron.training.fp8_health import OPERANDS
from tests.distributed.toy import launch, toy_config, write_dataset
from tests.gpu.test_backends import BF16, WIDE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def _spread(rows: int, columns: int) -> torch.Tensor:
    size = torch.exp2(torch.empty(rows, columns, device="cuda").uniform_(-30, 5))
    return (size * torch.randn_like(size).sign()).bfloat16()


@pytest.mark.parametrize("number_format", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("scaling", ["tensor", "block_128", "square_128"])
def test_counted_are_the_zeros_of_the_cast(number_format: Format, scaling: Scaling) -> None:
    from transformer_engine.pytorch import Float8BlockQuantizer, Float8CurrentScalingQuantizer

    import transformer_engine_torch as tex  # isort: skip; the package above loads it

    dtype = tex.DType.kFloat8E4M3 if number_format is E4M3 else tex.DType.kFloat8E5M2
    quantizer: Any
    if scaling == "tensor":
        quantizer = Float8CurrentScalingQuantizer(dtype, device=torch.device("cuda"))
    else:
        quantizer = Float8BlockQuantizer(
            dtype,
            rowwise=True,
            columnwise=False,
            force_pow_2_scales=True,
            block_scaling_dim=2 if scaling == "square_128" else 1,
        )
    x = _spread(512, 1024)
    cast = quantizer(x).dequantize()
    count, lost, clipped = lost_and_clipped(
        x, own_scale(x, number_format, scaling), number_format
    ).tolist()
    zeros = int(((cast == 0) & (x != 0)).sum())
    print(f"{scaling}: {count:.0f} numbers, {lost:.0f} counted as lost, {zeros} are zero")
    assert clipped == 0 and lost > 1000
    # A scale is rounded differently here and there: a number on the border may fall either way.
    assert abs(lost - zeros) <= 1e-4 * count


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_a_run_records_every_product(tmp_path: Path, recipe: str) -> None:
    fields = {
        **WIDE,
        **BF16,
        "precision.fp8": "hybrid",
        "precision.fp8_recipe": recipe,
        "logging.log_fp8_health_interval": 5,
        "training.train_steps": 10,
    }
    prefix = write_dataset(tmp_path)
    launch(1, [{"name": "run", "config": toy_config(prefix, tmp_path / "run", **fields)}], tmp_path)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl", "fp8")
    assert [record["step"] for record in records] == [5, 10]
    for record in records:
        assert len(record["names"]) == len(set(record["names"])) > 4
        for operand in OPERANDS:
            figures = record[operand]
            assert all(math.isfinite(amax) and amax > 0 for amax in figures["amax"])
            assert max(figures["clipped"]) < (0.05 if recipe == "delayed" else 1e-9)
            assert max(figures["lost"]) < 0.9
        print(recipe, {operand: max(record[operand]["lost"]) for operand in OPERANDS})
