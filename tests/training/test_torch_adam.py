"""The mended distributed optimizer resumes as if it had never stopped; megatron's own does not."""

import json
from typing import Any

import pytest

from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("torch_adam")
    run_ranks("tests.training.torch_adam_ranks", 2, folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("sharding", ["fully_reshardable", "dp_reshardable"])
def test_resuming_is_bitwise_the_uninterrupted_run(results, dtype, sharding):
    outcome = results[f"{dtype} {sharding}"]
    whole, resumed = outcome["losses"]
    assert resumed == whole and len(whole) == 3
    assert outcome["same"]
    assert outcome["steps"] == [5]


def test_one_step_tensor_for_all_parameters_would_be_noticed(results):
    outcome = results["shared step"]
    assert not outcome["same"]
    assert outcome["losses"][0] != outcome["losses"][1]
    assert outcome["steps"][-1] > 5


def test_megatrons_own_class_cannot_load(results):
    assert results["wheel"]["fresh state_dict"].startswith("AssertionError")
    assert results["wheel"]["load"] == "KeyError: 'step'"
    assert "in-place operation" in results["wheel"]["load with gradients"]


def test_mixed_groups_save_each_parameters_own_state(results):
    assert results["wheel order"] > 0
    assert results["mended order"] == 0


def test_padded_buckets_do_not_shift_the_state(results):
    assert results["wheel positions"] > 0
    assert results["mended positions"] == 0


def test_a_rank_without_parameters_knows_the_step(results):
    assert results["idle rank"] == [0, 1, 2]
