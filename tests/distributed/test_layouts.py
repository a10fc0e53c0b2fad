"""The public claim: losses and gradients do not depend on the layout, and a run that moves to
another layout half-way is the run that stayed.

One launch for each world size; every run starts from the seed (initial weights are the same for
all layouts), runs 20 fp32 steps and saves where the test needs it.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from samba_megatron.config.parallel import RECOMPUTABLE_PARTS
from tests.distributed.toy import (
    STEPS,
    launch,
    losses,
    saved_tensors,
    toy_config,
    write_dataset,
    write_short_documents,
)

TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
VPP, SP = "parallel.virtual_pipeline_model_parallel_size", "parallel.sequence_parallel"
CP = "parallel.context_parallel_size"
CHUNKED = {"kernels.cross_entropy": "chunked"}
HALF = STEPS // 2

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "recompute_full": (1, {"parallel.recompute_granularity": "full"}),
    "recompute_selective": (
        1,
        {
            "parallel.recompute_granularity": "selective",
            "parallel.recompute_modules": ["mamba", "attention", "mlp"],
        },
    ),
    "recompute_parts": (
        1,
        {
            "parallel.recompute_granularity": "selective",
            "parallel.recompute_modules": list(RECOMPUTABLE_PARTS),
        },
    ),
    "micro_batch_4": (1, {"training.micro_batch_size": 4}),
    "dp2": (2, {}),
    "dp2_no_overlap": (
        2,
        {"parallel.overlap_grad_reduce": False, "parallel.overlap_param_gather": False},
    ),
    "tp2": (2, {TP: 2}),
    "tp2_sp_recompute": (2, {TP: 2, SP: True, "parallel.recompute_granularity": "full"}),
    "pp2": (2, {PP: 2}),
    "pp2_vpp2": (2, {PP: 2, VPP: 2}),
    "tp2_pp2_sp": (4, {TP: 2, SP: True, PP: 2}),
    "tp2_dp2": (4, {TP: 2}),
    "cp2": (2, {CP: 2}),
    "cp2_tp2_sp": (4, {CP: 2, TP: 2, SP: True}),
    "cp2_pp2": (4, {CP: 2, PP: 2}),
    "cp2_dp2": (4, {CP: 2}),
    "chunked": (1, CHUNKED),
    "chunked_pp2_dp2": (4, {PP: 2, **CHUNKED}),
}
"""Name → (processes, what differs from one process)."""

MOVES = [
    ("one", "tp2_pp2_sp"),
    ("dp2", "dp2"),
    ("dp2", "one"),
    ("tp2_dp2", "pp2_vpp2"),
    ("cp2", "one"),
]
"""Saved half-way in the first layout, resumed in the second."""

WITH_DOCUMENTS = {
    "one": (1, {}),
    "tp2_sp_selective": (2, {TP: 2, SP: True, **LAYOUTS["recompute_selective"][1]}),
    "pp2_vpp2_full": (2, {PP: 2, VPP: 2, **LAYOUTS["recompute_full"][1]}),
    "pp4": (4, {PP: 4}),
    "cp2_pp2": (4, {CP: 2, PP: 2}),
}
"""The same for documents that stay apart; in "pp4" two stages read nothing but where they begin."""

WITH_VALIDATION = {
    "validation.eval_interval": HALF,
    "validation.eval_tokens": 1024,
    "data.split": "90,10,0",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs of this module lie; everything is run once."""
    folder = tmp_path_factory.mktemp("layouts")
    prefix = write_dataset(folder)
    first: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 4: []}
    second: dict[int, list[dict[str, Any]]] = {1: [], 2: [], 4: []}

    def spec(name: str, layout: str, **fields: Any) -> dict[str, Any]:
        config = toy_config(prefix, folder / name, **WITH_VALIDATION, **LAYOUTS[layout][1])
        return {"name": name, "config": {**config, **fields}}

    for layout, (processes, _) in LAYOUTS.items():
        first[processes].append(spec(layout, layout))
        # Adam's first moment after one step is a tenth of the (clipped) gradient.
        one_step = spec(f"{layout}-one_step", layout, **{"training.exit_step": 1, "exit_code": 75})
        one_step["exit_code"] = one_step["config"].pop("exit_code")
        one_step["config"].pop("validation.eval_interval")
        first[processes].append(one_step)
    short = write_short_documents(folder)
    for layout, (processes, fields) in WITH_DOCUMENTS.items():
        name = f"documents-{layout}"
        config = toy_config(short, folder / name, **WITH_VALIDATION, **fields)
        config["data.reset_at_document_boundaries"] = True
        first[processes].append({"name": name, "config": config})
    for source, target in MOVES:
        name = f"{source}-to-{target}"
        save = {"training.exit_step": HALF, "checkpoint.save_interval": HALF}
        first[LAYOUTS[source][0]].append(spec(name, source, **save) | {"exit_code": 75})
        second[LAYOUTS[target][0]].append(spec(name, target))
    for wave in (first, second):
        for processes, specs in wave.items():
            if specs:
                launch(processes, specs, folder)
    return folder


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_losses_equal_one_process(folder: Path, layout: str) -> None:
    """20 training losses, and the held-out losses half-way and at the end."""
    reference = losses(folder / "one")
    assert len(reference) == STEPS
    assert reference[-1] < reference[0] - 1, "the toy run must learn for the test to mean anything"
    assert losses(folder / layout) == pytest.approx(reference, abs=1e-5)
    held_out = losses(folder / "one", "validation")
    assert len(held_out) == 1
    assert losses(folder / layout, "validation") == pytest.approx(held_out, abs=1e-5)


@pytest.mark.parametrize("layout", [name for name in WITH_DOCUMENTS if name != "one"])
def test_losses_of_documents_apart_equal_one_process(folder: Path, layout: str) -> None:
    """Training and held-out losses, where each sample holds several documents."""
    for kind in ("train", "validation"):
        reference = losses(folder / "documents-one", kind)
        assert len(reference) == (STEPS if kind == "train" else 1)
        assert losses(folder / f"documents-{layout}", kind) == pytest.approx(reference, abs=1e-5)


@pytest.mark.parametrize("layout", ["recompute_full", "recompute_selective", "recompute_parts"])
def test_recomputation_changes_no_bit(folder: Path, layout: str) -> None:
    """Recomputed activations are the same numbers."""
    assert losses(folder / layout) == losses(folder / "one")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_gradients_equal_one_process(folder: Path, layout: str) -> None:
    """Every parameter's gradient at step 1, by the first moment in the checkpoint."""
    reference = first_moments(folder / "one-one_step")
    moments = first_moments(folder / f"{layout}-one_step")
    assert moments.keys() == reference.keys()
    assert len(reference) > 30
    for name, expected in reference.items():
        scale = float(expected.abs().max())
        assert scale > 0, f"{name} has no gradient"
        error = float((moments[name] - expected).abs().max())
        assert error <= 1e-5 * scale + 1e-9, f"{name}: {error} of {scale}"


@pytest.mark.parametrize(("source", "target"), MOVES)
def test_moved_run_equals_the_uninterrupted_one(folder: Path, source: str, target: str) -> None:
    """Saved at step 10 in one layout, resumed to step 20 in another."""
    moved = losses(folder / f"{source}-to-{target}")
    assert len(moved) == STEPS
    assert moved == pytest.approx(losses(folder / "one"), abs=1e-5)
    if source == target:
        assert moved == losses(folder / source), "in the same layout not a bit may differ"


def first_moments(run_dir: Path) -> dict[str, torch.Tensor]:
    """exp_avg of every parameter in a run's only checkpoint, whole, by parameter name."""
    return saved_tensors(run_dir / "checkpoints" / "step_0000001", "optimizer.state.exp_avg.")
