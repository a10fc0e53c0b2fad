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
        ("samba_421m", [], 33.9),
        ("samba_421m", ["--precision.fp8", "hybrid"], 31.4),
        ("samba_1.3b", [], 77.5),
        ("samba_1.3b", ["--precision.fp8", "hybrid"], 72.7),
    ],
)
def test_measured_runs_are_met(recipe: str, fields: list[str], measured: float) -> None:
    """Peaks of whole steps on one H200 (docs/performance.md), micro-batch 8, one micro-batch."""
    one = ["--training.micro_batch_size", "8", "--training.global_batch_size", "8"]
    total = plan(recipe, 1, *fields, *one).total_bytes / 2**30
    assert total == pytest.approx(measured, rel=0.03)


def test_weights_in_fp8_are_not_in_bf16_too() -> None:
    """A linear's number: two bytes of bf16 and two of FP8 copies; the copies alone, kept in FP8."""
    fp8 = ["--precision.fp8", "hybrid"]
    bf16, beside = plan("samba_421m", 1), plan("samba_421m", 1, *fp8)
    instead = plan("samba_421m", 1, *fp8, "--precision.fp8_param_gather", "true")
    assert instead.weights == bf16.weights < beside.weights
    assert (instead.gradients, instead.optimizer) == (bf16.gradients, bf16.optimizer)


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


def test_chunked_logits_grow_with_the_chunk_alone() -> None:
    """4096 tokens of 32,000 bf16 logits fill a chunk; beside it the gradients of the hidden states,
    which grow with the tokens, and of the weight in fp32."""
    chunked = ["--kernels.cross_entropy", "chunked"]
    fixed = 4096 * 32000 * 2 + 32000 * 2304 * 4
    assert plan("samba_1.3b", 1, *chunked).head == fixed + 8 * 4096 * 2304 * 2
    more = [*chunked, "--training.micro_batch_size", "16", "--training.global_batch_size", "512"]
    assert plan("samba_1.3b", 1, *more).head == fixed + 16 * 4096 * 2304 * 2
    assert plan("samba_1.3b", 1).head == 8 * 4096 * 32000 * 4
    theirs = ["--kernels.cross_entropy", "megatron"]
    assert plan("samba_1.3b", 1, *theirs).head == 8 * 4096 * 32000 * 6
    split = ["--parallel.tensor_model_parallel_size", "2", "--parallel.sequence_parallel", "true"]
    gathered = 2 * 8 * 4096 * 2304 * 2
    assert plan("samba_1.3b", 2, *chunked, *split).head == (
        8192 * 16000 * 2 + 16000 * 2304 * 4 + gathered
    )


def test_recomputation_saves() -> None:
    """Full keeps a layer's input (2 bytes a number) and computes one layer at a time again, of
    which Mamba's is the largest: 14 d numbers. The Mamba mixer alone saves 6 d of 40 a block."""
    granularity = ["--parallel.recompute_granularity"]
    none = plan("samba_1.3b", 1).activations
    mamba = plan("samba_1.3b", 1, *granularity, "selective").activations_by_kind
    full = plan("samba_1.3b", 1, *granularity, "full").activations
    assert mamba.pop("recomputing") == 8 * 4096 * 2 * 2304 * 6
    assert sum(mamba.values()) == pytest.approx(none * (40 - 6) / 40, rel=1e-6)
    assert full == 8 * 4096 * 2 * 2304 * (36 + 14)


@pytest.mark.parametrize(
    ("names", "numbers", "at_once"),
    [
        ("mlp_act", 18 * 6144, 6144),
        ("conv1d", 9 * 4608, 4608),
        ("dt_proj", 9 * 4608, 4608),
        ("layernorm", 36 * 2304, 2304),
        ("scan", 9 * 2 * 4608, 2 * 4608),
        ("mlp_act,conv1d,dt_proj", 18 * 6144 + 18 * 4608, 2 * 4608),
        ("mlp", 18 * (3 * 6144 + 2304), 3 * 6144 + 2304),
        ("mlp,layernorm", 18 * (3 * 6144 + 2304), 3 * 6144),
    ],
)
def test_recomputed_results_are_not_kept(names: str, numbers: int, at_once: int) -> None:
    """Numbers a token, written out; those of one layer are there again while it is its turn. A norm
    apart from its linear is what a whole MLP is computed again from."""
    selective = ["--parallel.recompute_granularity", "selective"]
    modules = ["--parallel.recompute_modules", f"[{names}]"]
    none = plan("samba_1.3b", 1).activations
    kept = plan("samba_1.3b", 1, *selective, *modules).activations_by_kind
    assert kept.pop("recomputing") == 8 * 4096 * 2 * at_once
    assert none - sum(kept.values()) == 8 * 4096 * 2 * numbers
