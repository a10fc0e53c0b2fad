"""What a run says of itself is the same in every layout; the planner's bytes are the real ones."""

import json
from pathlib import Path
from typing import Any

import pytest

from samba_megatron.training.fp8_health import OPERANDS
from samba_megatron.training.stragglers import stand_out
from tests.ranks import run_ranks
from tests.training.account_ranks import DTYPES, LAYOUTS, WORLD

NAMES = [f"{layout} {dtype}" for layout in LAYOUTS for dtype in DTYPES[layout]]
IN_FP32 = [name for name in NAMES if name.endswith("fp32")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("account")
    run_ranks("tests.training.account_ranks", WORLD, folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_planned_bytes_are_the_real_ones(results: dict[str, Any], name: str) -> None:
    """To the byte; megatron's buffers pad each parameter to 64 numbers and each bucket's end."""
    for rank in results[name]["bytes"]:
        planned = rank["planned"]
        assert (rank["weights"], rank["gradients"]) == (planned["weights"], planned["gradients"])
        padding = rank["buffers"] - rank["gradients"]
        assert 0 <= padding <= 4 * (64 * rank["numbers"] + 512 * rank["buckets"])
        shared = sum(results[name]["bytes"][peer]["optimizer"] for peer in rank["group"])
        assert 0 <= shared - planned["optimizer"] * len(rank["group"]) < len(rank["group"])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_layer_make_up_the_gradient_norm(results: dict[str, Any], name: str) -> None:
    norms = results[name]["layers"]["gradient_norm"]
    total = sum(norm**2 for norm in norms) ** 0.5
    assert total == pytest.approx(results[name]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("name", IN_FP32[1:])
def test_norms_by_layer_do_not_depend_on_the_layout(results: dict[str, Any], name: str) -> None:
    layers, expected = results[name]["layers"], results[NAMES[0]]["layers"]
    assert layers["names"] == expected["names"]
    assert layers["names"][:4] == [
        "embedding",
        "layer 1 (mamba)",
        "layer 2 (mlp)",
        "layer 3 (attention)",
    ]
    for figure in ("weight_norm", "gradient_norm", "activation_rms"):
        for ours, theirs in zip(layers[figure], expected[figure], strict=True):
            assert ours == (theirs if theirs is None else pytest.approx(theirs, rel=1e-4))


@pytest.mark.parametrize("name", IN_FP32)
def test_what_fp8_loses_does_not_depend_on_the_layout(results: dict[str, Any], name: str) -> None:
    found, expected = results[name]["fp8"], results[NAMES[0]]["fp8"]
    assert found["names"] == expected["names"]
    assert found["names"][:3] == [
        "layer 1 (mamba) in_proj",
        "layer 1 (mamba) out_proj",
        "layer 2 (mlp) linear_fc1",
    ]
    for operand in OPERANDS:
        assert found[operand]["amax"] == pytest.approx(expected[operand]["amax"], rel=1e-3)
        assert min(found[operand]["amax"]) > 0 and max(found[operand]["clipped"]) == 0
        for linear, ours, theirs in zip(
            found["names"], found[operand]["lost"], expected[operand]["lost"], strict=True
        ):
            # Two ranks' parts of attention's heads are no multiple of a block.
            assert "(attention)" in linear or ours == pytest.approx(theirs, abs=1e-4)
    lost = found["weight"]["lost"]
    assert lost[2] == pytest.approx(0.5, abs=1e-3) and max(lost[:2]) < 1e-3
    assert "(weight of layer " in found["worst"] and "0.00% clipped" in found["worst"]


@pytest.mark.parametrize("name", NAMES)
def test_times_of_the_parts_make_up_the_step(results: dict[str, Any], name: str) -> None:
    for steps in zip(*results[name]["seconds"], strict=True):
        shares = []
        for seconds in steps:
            parts = [seconds[part] for part in ("forward", "backward", "gradient_reduce")]
            assert all(part > 0 for part in parts)
            assert ("bubble" in seconds) == ("pp" in name)
            whole = sum(parts) + seconds.get("bubble", 0.0)
            assert whole <= seconds["forward_backward"]
            shares.append(whole / seconds["forward_backward"])
        assert max(shares) > 0.5, "of each rank, as what is not timed may have had to wait once"


@pytest.mark.parametrize("name", IN_FP32)
def test_the_first_tensor_that_is_not_finite_is_named(results: dict[str, Any], name: str) -> None:
    sentence = results[name]["fault"]
    assert "is not finite; first not finite: the output of mixer.out_proj in layer 5" in sentence
    # Of two stages the second holds it; of two chunks a stage, the first stage's second.
    assert f"rank {1 if name == 'pp2 fp32' else 0} on " in sentence


@pytest.mark.parametrize("name", IN_FP32)
def test_a_gradient_is_named_where_the_losses_are_finite(
    results: dict[str, Any], name: str
) -> None:
    sentence = results[name]["gradient fault"]
    assert "first not finite: the gradient of mlp.linear_fc2.weight in layer 4 (mlp), " in sentence


def test_slow_ranks_stand_out_of_their_stage() -> None:
    nodes = [f"n{rank // 2}" for rank in range(8)]
    stages = [0, 0, 0, 0, 1, 1, 1, 1]
    seconds = [1.0, 1.01, 0.99, 1.0, 2.0, 2.02, 2.6, 1.99]
    (found,) = stand_out(seconds, stages, nodes)
    assert (found.rank, found.node, found.stage) == (6, "n3", 1)
    assert found.slower == pytest.approx(2.6 / 2.01 - 1)
    assert "rank 6 on n3 computes 2.600 s a step, 29 % longer than its peers" in str(found)
    assert stand_out([1.0, 1.03, 1.0, 1.0], [0] * 4, nodes) == []  # 3 % are nobody's fault
    assert stand_out([1.0, 9.0], [0] * 2, nodes) == []  # of two, which is the odd one?
    assert stand_out([0.8, 0.9, 1.0, 1.1, 1.2], [0] * 5, nodes) == []  # all differ
