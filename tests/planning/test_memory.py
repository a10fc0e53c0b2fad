"""The memory estimate against measured runs, and against what layouts must do to it."""

import pytest

from samba_megatron.config.load import parse_run_config
from samba_megatron.planning.memory import MemoryEstimate, estimate


def plan(recipe: str, world_size: int, *fields: str) -> MemoryEstimate:
    """The estimate of a recipe with further fields."""
    return estimate(parse_run_config(["--config", recipe, *fields]), world_size)


@pytest.mark.parametrize(
    ("recipe", "fields", "measured"),
    [
        ("samba_421m", [], 36.1),
        ("samba_421m", ["--precision.fp8", "hybrid"], 33.6),
        ("samba_1.3b", [], 77.4),
        ("samba_1.3b", ["--precision.fp8", "hybrid"], 72.5),
    ],
)
def test_measured_runs_are_met(recipe: str, fields: list[str], measured: float) -> None:
    """Peaks of whole steps on one H200 (docs/performance.md), micro-batch 8, one micro-batch."""
    one = ["--training.micro_batch_size", "8", "--training.global_batch_size", "8"]
    total = plan(recipe, 1, *fields, *one).total_bytes / 2**30
    assert total == pytest.approx(measured, rel=0.03)


def test_data_parallelism_divides_the_optimizer_alone() -> None:
    """The distributed optimizer: everything else stays."""
    one, eight = plan("samba_421m", 1), plan("samba_421m", 8)
    assert eight.optimizer == one.optimizer // 8
    assert (eight.weights, eight.gradients) == (one.weights, one.gradients)
    assert eight.activations == one.activations


def test_tensor_and_sequence_parallelism_divide_activations() -> None:
    """All of them with sequence parallelism, only those inside layers without."""
    tensor = ["--parallel.tensor_model_parallel_size", "2"]
    whole, split = plan("samba_421m", 2), plan("samba_421m", 2, *tensor)
    both = plan("samba_421m", 2, *tensor, "--parallel.sequence_parallel", "true")
    assert both.activations == whole.activations // 2 < split.activations < whole.activations


def test_first_stage_holds_the_most_micro_batches() -> None:
    """1F1B: stage i of p has p - i under way, so the sum stays about what one stage had."""
    two = plan("samba_1.3b", 2, "--parallel.pipeline_model_parallel_size", "2")
    one = plan("samba_1.3b", 1)
    assert two.stage == 0 and two.head == 0
    assert two.activations == pytest.approx(one.activations, rel=0.15)
    assert two.weights < 0.6 * one.weights


def test_recomputation_saves() -> None:
    """Full keeps a layer's input (2 bytes a number) and computes one layer at a time again, of
    which Mamba's is the largest: 14 d numbers. The Mamba mixer alone saves 6 d of 40 a block."""
    granularity = ["--parallel.recompute_granularity"]
    none = plan("samba_1.3b", 1).activations
    mamba = plan("samba_1.3b", 1, *granularity, "selective").activations
    full = plan("samba_1.3b", 1, *granularity, "full").activations
    assert mamba == pytest.approx(none * (40 - 6) / 40, rel=1e-6)
    assert full == 8 * 4096 * 2 * 2304 * (36 + 14)
