"""On a GPU: one exported folder, loaded by flash-linear-attention and by the code shipped with it;
that code with the fast kernels and without; and training that goes on from the same weights.

A model written by flash-linear-attention is imported, exported again, and given to all sides.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from samba_megatron.checkpoint.huggingface.export import ExportOptions, export
from samba_megatron.checkpoint.huggingface.importing import import_model
from tests.checkpoint.huggingface import model_sides

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
ROOT = Path(__file__).parents[2]
FP32_TOLERANCE = 1e-4
KERNELS = {
    *("selective_scan_fn", "causal_conv1d_fn", "step_kernels"),
    *("flash_attn_func", "flash_attn_with_kvcache"),
}


class Sides:
    """What each side has found; a side that has failed fails the tests that ask for it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs: dict[str, Any] = {}

    def start(self, name: str, source: Path) -> None:
        log = (self._folder / f"{name}.log").open("w")
        command = [sys.executable, "-m", model_sides.__name__, name, source, self._output(name)]
        environment = {**os.environ, "HF_MODULES_CACHE": str(self._folder / f"{name}.modules")}
        self._runs[name] = subprocess.Popen(
            list(map(str, command)), cwd=ROOT, env=environment, stdout=log, stderr=log
        )

    def __getitem__(self, name: str) -> Any:
        if self._runs[name].wait(timeout=250) != 0:
            pytest.fail(f"{name}: " + (self._folder / f"{name}.log").read_text()[-3000:])
        output = self._output(name)
        return torch.load(output) if output.is_file() else output

    def stop(self) -> None:
        for run in self._runs.values():
            run.kill()
            run.wait()

    def _output(self, name: str) -> Path:
        return self._folder / name


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sides]:
    """All of them, running at once."""
    if find_spec("fla") is None:
        pytest.skip("needs flash-linear-attention")
    folder = tmp_path_factory.mktemp("huggingface")
    sides = Sides(folder)
    sides.start("make", folder)
    checkpoint = import_model(sides["make"], folder / "imported", print).path
    export(ExportOptions(checkpoint, folder / "exported", compare="tensors"), print)
    for name in ("fla", "fla_trains", "shipped"):
        sides.start(name, folder / "exported")
    sides.start("ours", checkpoint)
    yield sides
    sides.stop()


def differences(name: str, found: list[Any], expected: list[Any]) -> tuple[float, float]:
    """Largest and mean absolute difference of tensors, printed."""
    apart = torch.cat([(a - b).abs().flatten() for a, b in zip(found, expected, strict=True)])
    largest, mean = float(apart.max().nan_to_num(nan=float("inf"))), float(apart.mean())
    spread = float(torch.cat([b.flatten() for b in expected]).std())
    print(f"{name}: largest {largest:.2e}, mean {mean:.2e} (of values with deviation {spread:.2f})")
    assert spread > 0.1, "logits that show nothing"
    return largest, mean


def test_one_folder_two_classes(sides: Sides) -> None:
    """With fla imported, its class; without, the shipped one; the same logits."""
    theirs, shipped = sides["fla"], sides["shipped"]
    assert theirs["module"].startswith("fla.") and "transformers_modules" in shipped["module"]
    fp32 = differences("fla against shipped, fp32", shipped["fp32"], theirs["fp32"])
    bf16 = differences("fla against shipped, bf16", shipped["bf16"], theirs["bf16"])
    assert fp32[0] <= FP32_TOLERANCE and bf16[1] < 0.05


def test_our_model_gives_the_same_logits(sides: Sides) -> None:
    ours = differences("ours against fla, fp32", sides["ours"]["fp32"], sides["fla"]["fp32"])
    assert ours[0] <= FP32_TOLERANCE


def test_kernels_are_found_and_equal_torch(sides: Sides) -> None:
    shipped = sides["shipped"]
    assert set(shipped["kernels"]) == KERNELS
    fp32 = differences("kernels against torch, fp32", shipped["fp32"], shipped["fp32 in torch"])
    bf16 = differences("kernels against torch, bf16", shipped["bf16"], shipped["bf16 in torch"])
    assert fp32[0] <= FP32_TOLERANCE and bf16[1] < 0.05


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), ("bf16", 0.25)])
def test_gradients_of_the_kernels(sides: Sides, dtype: str, tolerance: float) -> None:
    """Each parameter's, relative to its norm."""
    shipped = sides["shipped"]
    expected = shipped[f"{dtype} gradients in torch"]
    apart = {
        name: float((gradient - expected[name]).norm() / expected[name].norm())
        for name, gradient in shipped[f"{dtype} gradients"].items()
    }
    worst = max(apart, key=lambda name: apart[name])
    print(f"gradients in {dtype}: {worst} differs most, by {apart[worst]:.2e} of its norm")
    assert apart[worst] <= tolerance


def test_with_the_cache_as_without(sides: Sides) -> None:
    """A token's own kernels go on from the states of a prompt's."""
    shipped = sides["shipped"]
    fp32 = differences("cached, fp32", [shipped["fp32 cached"]], shipped["fp32"][-1:])
    bf16 = differences("cached, bf16", [shipped["bf16 cached"]], shipped["bf16"][-1:])
    assert fp32[0] <= FP32_TOLERANCE and bf16[1] < 0.05
    cached, whole = shipped["fp32 generated"]
    assert cached.shape == (2, 120) and torch.equal(cached, whole)
    same = (torch.eq(*shipped["bf16 generated"])).float().mean()
    print(f"generated in bf16: {float(same):.0%} of the tokens are the same")


def test_training_goes_on_as_the_original_would(sides: Sides) -> None:
    """Losses of a few AdamW steps in fp32 from the same weights."""
    curves = {
        "fla": sides["fla_trains"],
        "ours": sides["ours"]["losses"],
        "shipped": sides["shipped"]["losses in torch"],
    }
    for name, losses in curves.items():
        print(f"{name}: {' '.join(f'{loss:.5f}' for loss in losses)}")
    assert curves["fla"][-1] < curves["fla"][0] - 0.3
    for losses in curves.values():
        assert losses == pytest.approx(curves["fla"], abs=2e-3)
        assert losses[0] == pytest.approx(curves["fla"][0], abs=1e-4)
