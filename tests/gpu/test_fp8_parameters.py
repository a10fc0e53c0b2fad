"""On a GPU: weights kept in FP8 (precision.fp8_param_gather).

The matrix products see the same bytes as where bf16 weights are cast in each step: the optimizer
casts main parameters through bf16, with scales found likewise. So losses should be equal but for
the gradient norm, which is summed in another order; a difference like that between number formats
means that something else is seen. Checkpoints are the same with and without, and a resumed run is
the run that was stopped, to the last bit.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from samba_megatron.checkpoint.huggingface.export import ExportOptions, export
from samba_megatron.model import fp8_weights
from samba_megatron.tracking.metrics import read_metrics
from tests.distributed.toy import (
    STEPS,
    launch,
    losses,
    saved_tensors,
    toy_config,
    write_dataset,
)
from tests.gpu.test_backends import BF16, WIDE, worst

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(900),
]
HALF = STEPS // 2
RECIPES = ("tensorwise", "blockwise", "delayed")
STOPPED: dict[str, Any] = {"checkpoint.save_interval": HALF, "training.exit_step": HALF}
LOOKING = {"logging.log_layer_norms_interval": HALF, "logging.log_fp8_health_interval": HALF}
KEPT: dict[str, Any] = {"precision.fp8_param_gather": True}
FORMAT_NOISE = 2e-3
"""Between runs in FP8 that round here and there differently: three times what an H200 gave."""


def _recipe(name: str) -> Any:
    from transformer_engine.common import recipe

    made = {
        "tensorwise": recipe.Float8CurrentScaling,
        "blockwise": recipe.Float8BlockScaling,
        "delayed": recipe.DelayedScaling,
    }
    return made[name](fp8_format=recipe.Format.HYBRID)


def _linear(recipe: str, kept: bool) -> Any:
    import transformer_engine.pytorch as te

    with te.quantized_model_init(
        enabled=kept, recipe=_recipe(recipe), preserve_high_precision_init_val=True
    ):
        return te.Linear(256, 384, bias=False, params_dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_linear_by_itself(recipe: str) -> None:
    """What model/fp8_weights.py relies on, without megatron: look here first."""
    import transformer_engine.pytorch as te

    torch.manual_seed(1)
    value, x = torch.randn(384, 256), torch.randn(128, 256).cuda().bfloat16()
    results = {}
    for kept in (False, True):
        linear = _linear(recipe, kept)
        weight = linear.weight
        print(f"{recipe}, kept {kept}: {type(weight).__name__}, quantised", end=" ")
        print(fp8_weights.is_quantized(weight), weight.dtype, weight.type(), tuple(weight.shape))
        assert fp8_weights.is_quantized(weight) is kept
        with torch.no_grad():
            fp8_weights.set_initial(weight, value)
        if kept:
            print("usages", weight.get_usages(), "of", type(weight._get_quantizer()).__name__)
            # The main parameter is made of this, not of what was cast.
            assert torch.equal(weight.get_high_precision_init_val(), value.bfloat16())
            assert type(fp8_weights.plain(weight.detach())) is torch.Tensor
        apart = (fp8_weights.plain(weight.detach()).float().cpu() - value).abs().max()
        print(f"largest difference from what was written: {float(apart):.2e}")
        assert apart < (0.3 if kept else 0.02)
        source = x.clone().requires_grad_()
        with te.autocast(enabled=True, recipe=_recipe(recipe)):
            product = linear(source)
        product.float().square().sum().backward()
        results[kept] = [product.detach(), source.grad, weight.grad]
    for name, plain, kept_one in zip(
        ("product", "gradient of x", "gradient of w"), results[False], results[True], strict=True
    ):
        difference = float((plain - kept_one).abs().max() / plain.abs().max())
        print(f"{recipe}: {name} differs by {difference:.2e} of its largest number")
        assert difference <= 1e-2


@pytest.fixture(scope="module", params=RECIPES)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one recipe: whole runs with and without, and runs that stop and go on in either way."""
    folder = tmp_path_factory.mktemp(request.param)
    prefix = write_dataset(folder)
    fp8 = {**WIDE, **BF16, "precision.fp8": "hybrid", "precision.fp8_recipe": request.param}
    specs: list[dict[str, Any]] = []

    def add(name: str, code: int = 0, **fields: Any) -> None:
        config = toy_config(prefix, folder / name, **fp8, **fields)
        specs.append({"name": name, "config": config, "exit_code": code})

    add("plain")
    add("kept", **KEPT, **LOOKING)
    add("kept_no_overlap", **KEPT, **{"parallel.overlap_param_gather": False})
    moves: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "kept_to_kept": (KEPT, KEPT),
        "kept_to_plain": (KEPT, {}),
        "plain_to_kept": ({}, KEPT),
    }
    for name, (before, after) in moves.items():
        add(name, 75, **before, **STOPPED)
        add(name, **after)
    # Weights alone: the optimizer's copies are made of them.
    for name, how in {"weights_to_kept": KEPT, "weights_to_plain": {}}.items():
        taken: dict[str, Any] = {
            "checkpoint.load": str(folder / "kept_to_kept" / "checkpoints"),
            "checkpoint.load_weights_only": True,
            "training.train_steps": 3,
        }
        add(name, **how, **taken)
    launch(1, specs, folder)
    return folder


def _compared(folder: Path, name: str, expected: str) -> float:
    found, wanted = losses(folder / name), losses(folder / expected)
    print(f"{folder.name}: {name} against {expected}, step by step")
    for step, (a, b) in enumerate(zip(found, wanted, strict=True), 1):
        print(f"  {step:2d} {a:.6f} {b:.6f} {a - b:+.1e}")
    return worst(found, wanted)


def test_losses_are_those_of_bf16_weights(folder: Path) -> None:
    difference = _compared(folder, "kept", "plain")
    first = losses(folder / "kept")[0] - losses(folder / "plain")[0]
    print(f"worst {difference:.2e}, in the first step {first:.1e} (expected: 0)")
    assert losses(folder / "kept")[-1] < losses(folder / "kept")[0] - 0.3
    assert first == 0.0 and difference <= FORMAT_NOISE


def test_overlap_changes_nothing(folder: Path) -> None:
    assert _compared(folder, "kept_no_overlap", "kept") == 0.0


def test_resumed_run_equals_the_whole(folder: Path) -> None:
    """Not a bit may differ: weights are cast from main parameters as they were before the save."""
    assert _compared(folder, "kept_to_kept", "kept") == 0.0


@pytest.mark.parametrize("name", ["kept_to_plain", "plain_to_kept"])
def test_runs_go_on_in_the_other_way(folder: Path, name: str) -> None:
    assert _compared(folder, name, "plain") <= FORMAT_NOISE


def test_weights_alone_are_taken_in_either_way(folder: Path) -> None:
    assert _compared(folder, "weights_to_kept", "weights_to_plain") <= FORMAT_NOISE


def test_records_of_layers_and_casts_are_there(folder: Path) -> None:
    for kind in ("layers", "fp8"):
        records = read_metrics(folder / "kept" / "metrics.jsonl", kind)
        assert [record["step"] for record in records] == [HALF, STEPS], kind
        print(folder.name, kind, str(records[-1])[:600])


def test_checkpoints_are_the_same_kind(folder: Path) -> None:
    """Same keys, shapes and dtypes; weights are the main parameters in bf16, not what FP8 left."""
    checkpoints = {
        name: folder / name / "checkpoints" / f"step_{HALF:07d}"
        for name in ("kept_to_kept", "plain_to_kept")
    }
    kept, plain = (saved_tensors(path, "") for path in checkpoints.values())
    described = [{k: (v.shape, v.dtype) for k, v in each.items()} for each in (kept, plain)]
    only = {k for k in described[0].keys() ^ described[1].keys() if "_extra_state" not in k}
    print(f"{folder.name}: {len(kept)} and {len(plain)} tensors; in one alone: {sorted(only)}")
    assert not only
    assert all(described[0][k] == described[1][k] for k in kept if k in plain)
    compared = 0
    for key, main in kept.items():
        name = key.removeprefix("optimizer.state.param.")
        if name == key:
            continue
        weight = kept[name]
        apart = (weight.float() - main.to(weight.dtype).float()).abs().max()
        assert apart == 0, f"{name} is {float(apart):.2e} from its main parameter"
        compared += 1
    print(f"{compared} weights are their main parameters, rounded to their dtype")
    assert compared >= 24


def test_the_export_passes_its_parity(folder: Path, tmp_path: Path) -> None:
    checkpoint = folder / "kept_to_kept" / "checkpoints" / f"step_{HALF:07d}"
    report = export(ExportOptions(checkpoint, tmp_path / "exported", compare="tensors"), print)
    print(report.parity)
    assert report.parity["passed"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("recipe", RECIPES)
def test_ranks_gather_what_one_rank_has(tmp_path: Path, recipe: str) -> None:
    """On two data-parallel ranks: parts of weights are cast with the scale of the whole."""
    prefix = write_dataset(tmp_path)
    fp8 = {**WIDE, **BF16, "precision.fp8": "hybrid", "precision.fp8_recipe": recipe}
    specs = [
        {"name": name, "config": toy_config(prefix, tmp_path / name, **fp8, **fields)}
        for name, fields in (("plain", {}), ("kept", KEPT))
    ]
    launch(2, specs, tmp_path)
    assert _compared(tmp_path, "kept", "plain") <= FORMAT_NOISE
