"""Models that flash-linear-attention's own class has written: imported, and trained on."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from samba_megatron.checkpoint.huggingface.export import ExportOptions, export
from samba_megatron.checkpoint.huggingface.importing import import_model
from samba_megatron.checkpoint.huggingface.source import CheckpointSource
from samba_megatron.platform.errors import UserError
from tests.checkpoint.huggingface import model_sides
from tests.ranks import ROOT

# Looked for, not imported: it would change what transformers' Auto classes take here.
pytestmark = pytest.mark.skipif(find_spec("fla") is None, reason="needs flash-linear-attention")


def run_side(name: str, source: Path, output: Path) -> None:
    """In a process of its own."""
    command = [sys.executable, "-m", model_sides.__name__, name, str(source), str(output)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What its save_pretrained writes."""
    folder = tmp_path_factory.mktemp("fla")
    run_side("make", folder, folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def imported(written: Path) -> CheckpointSource:
    return CheckpointSource(import_model(written, written.parent / "imported", print).path)


def test_every_tensor_is_read(written: Path, imported: CheckpointSource) -> None:
    expected = load_file(written / "model.safetensors")
    assert (imported.config.model.hybrid_layer_pattern, imported.config.model.window_size) == (
        *("M-*- x2", 96),
    )
    for link in imported.links:
        for name, part in link.split(imported.read(link)):
            assert torch.equal(part, expected.pop(name)), name
    assert not expected


def test_training_goes_on(
    written: Path, imported: CheckpointSource, own_modules: None, tmp_path: Path
) -> None:
    """Logits and the losses of a few steps: ours, and those of the folder exported again."""
    run_side("ours", imported.path, tmp_path / "ours")
    export(ExportOptions(imported.path, tmp_path / "exported", compare="tensors"), print)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    ours = torch.load(tmp_path / "ours")
    for found, expected in zip(model_sides.logits(model.eval()), ours["fp32"], strict=True):
        assert float(expected.std()) > 0.1
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    losses = model_sides.losses_of(model)
    assert losses[-1] < losses[0] - 0.3
    assert ours["losses"] == pytest.approx(losses, abs=1e-3)


def test_variants_that_do_not_exist_here_are_refused(written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "variant"
    shutil.copytree(written, folder)
    config = json.loads((folder / "config.json").read_text())
    for fields, said in (
        ({"attnres_block_size": 4}, "attnres_block_size"),
        ({"attn": {**config["attn"], "qk_norm": True}}, "attn.qk_norm"),
        ({"hidden_act": "relu"}, "hidden_act relu"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
        with pytest.raises(UserError, match=f"sets {said}, which this Samba does not have"):
            import_model(folder, tmp_path / "out", print)
