"""Faults, foreign checkpoints and a run killed in the middle of a write, in one process."""

import json
from typing import Any

import pytest

from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one_rank")
    run_ranks("tests.checkpoint.one_rank", 1, folder)
    return json.loads((folder / "results.json").read_text())


def test_kill_in_the_middle_of_a_background_write(results):
    assert results["killed"] == {
        "writer lives": False,
        "left": [".writing", "latest", "step_0000001"],
        "latest": "step_0000001\n",
    }


def test_the_next_start_goes_on_from_the_last_published(results):
    restart = results["restart"]
    assert restart["step"] == 1
    assert restart["same"]
    assert restart["left"] == ["latest", "step_0000001", "step_0000003"]
    assert restart["notices"] == ["removed step_0000002"]


def test_extra_state_of_transformer_engine_may_be_absent(results):
    extra = results["extra state"]
    assert extra["notices"] == [
        "checkpoint …/plain/step_0000001 has no state of Transformer Engine's modules: theirs "
        "starts anew"
    ]
    assert extra["same"]
    assert "decoder.layers.0.mixer.conv._extra_state" in extra["objects"]


def test_another_model_is_refused_by_name(results):
    hidden = results["foreign"]["hidden"]
    assert "plain/step_0000001 holds another model: " in hidden
    assert "is [" in hidden and "] here" in hidden
    assert hidden.endswith("model.hidden_size is 32 there, 64 here")
    assert "it lacks decoder.layers.4." in results["foreign"]["deeper"]
    assert "parameters, this model" in results["foreign"]["shallower"]
    assert "model.hybrid_layer_pattern is 'M-*-' there" in results["foreign"]["shallower"]


def test_weights_only(results):
    outcome = results["weights only"]
    assert "has no optimizer state: set checkpoint.load_weights_only" in outcome["error"]
    assert outcome["step"] == 0
    assert outcome["weights"]


def test_a_corrupt_checkpoint_falls_back_loudly(results):
    corrupt = results["corrupt"]
    assert corrupt["step"] == 1
    damage = "checkpoint …/step_0000003 is corrupt: the contents of __0_0.distcp have changed"
    assert corrupt["notices"][0].startswith(damage)
    assert corrupt["notices"][1] == "going on from …/step_0000001"
    assert corrupt["kept"].startswith(damage) and "fall_back is false" in corrupt["kept"]
    assert corrupt["unchecked"] == 3, "without the check nobody would have noticed"
    assert "__0_0.distcp has " in corrupt["none"], "truncated, seen before the contents are read"
    assert "… holds no good checkpoint" in corrupt["none"]


def test_retention_and_a_step_done_again(results):
    rollback = results["rollback"]
    assert rollback["kept"] == ["latest", "step_0000003", "step_0000004"]
    assert rollback["repeated"] is None
    assert rollback["replaced"]
    assert rollback["left"] == rollback["kept"]


@pytest.mark.parametrize("where", ["weights", "moments"])
def test_non_finite_numbers_are_never_saved(results, where):
    code, reason = results["not finite"][where]
    assert code == 76
    assert "not finite after step 5" in reason and reason.endswith("step_0000004")
    assert results["not finite"]["latest"] == "step_0000004"


@pytest.mark.parametrize("blocking", [0, 1])
def test_a_write_that_fails_leaves_the_last_checkpoint(results, blocking):
    fault = results["disk"][blocking]
    assert f"the checkpoint of step {5 + blocking} could not be written to …" in fault["error"]
    assert "(the writer of rank 0 failed; " in fault["error"]
    assert fault["latest"] == f"step_000000{4 + blocking}"
    assert fault["left"] == []
    assert fault["then"] == f"step_000000{5 + blocking}"


def test_sizes_and_contents(results):
    size = results["size"]
    assert size["foreseen"] == size["tensors"] < size["on disk"]
    assert size["parameters"] == size["counted"]
    assert size["problem"] is None
    assert size["embedding"] == {"shape": [64, 32], "dtype": "float32", "bytes": 8192}
    assert {"common_state", "rng"} <= set(size["objects"])


def test_a_suspicious_step_is_repeated_after_a_restart(results):
    assert results["rerun"] == {"state": "WILL_RERUN_FROM_CHECKPOINT", "batches": [[0, 1, 2]]}
