"""Saving, resuming and changing the layout, on two ranks over gloo."""

import json
from typing import Any

import pytest

from tests.ranks import run_ranks

LAYOUTS = ("tp2", "pp2", "vpp2")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two_ranks")
    run_ranks("tests.checkpoint.two_ranks", 2, folder)
    return json.loads((folder / "results.json").read_text())


def test_reports_say_what_was_published(results):
    step, name, size, stall = results["fp32"]["report"]
    assert (step, name) == (2, "step_0000002")
    assert size > 100_000 and stall > 0
    assert results["fp32"]["blocking"] == [3, True]
    assert results["fp32"]["again"] is None
    assert results["fp32"]["notices"] == []


@pytest.mark.parametrize("step", [2, 3, 6])
def test_same_layout_resumes_bitwise(results, step):
    # Step 2 was written in the background while step 3 changed every weight.
    whole, resumed = results["fp32"], results["resumed"][str(step)]
    assert resumed["progress"] == [step, 4 * step, {"seed": 1}]
    assert resumed["losses"] == whole["losses"][len(whole["losses"]) - (6 - step) :]
    assert resumed["fingerprint"] == whole["fingerprint"]
    assert resumed["notices"] == []


def test_bf16_with_fp32_main_parameters_resumes_bitwise(results):
    whole, resumed = results["bf16"], results["bf16 resumed"]
    assert resumed["losses"] == whole["losses"][1:]
    assert resumed["fingerprint"] == whole["fingerprint"]


def test_random_generators_go_on_where_they_were(results):
    assert results["resumed"]["3"]["draws"] == results["fp32"]["draws"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_holds_the_same_tensors(results, layout):
    assert results[layout]["differ"] == []
    (notice,) = results[layout]["notices"]
    assert "another layout (world_size 2, tensor 1, pipeline 1, context 1, data 2)" in notice


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_layout_trains_on_alike(results, layout):
    assert results[layout]["losses"] == pytest.approx(results["fp32"]["losses"][1:], abs=2e-6)


def test_the_first_layout_gets_its_state_back(results):
    assert results["back"] == results["fp32"]["at 3"]
