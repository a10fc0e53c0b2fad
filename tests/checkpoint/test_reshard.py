"""Rewritten checkpoints: nothing is lost, training goes on from them, damage is not copied."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from samba_megatron.checkpoint.inspect import inspect
from samba_megatron.checkpoint.reshard import ReshardOptions, reshard
from samba_megatron.platform.errors import UserError
from tests.checkpoint.tiny_run import whole_tensors
from tests.ranks import run_ranks
from tools import convert_checkpoint


def silent(text: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint of a tensor-parallel run, its copies, and what two ranks made of them."""
    folder = tmp_path_factory.mktemp("reshard")
    run_ranks("tests.checkpoint.reshard_ranks", 2, folder)
    return folder, json.loads((folder / "results.json").read_text())


def test_training_goes_on_from_a_copy_bit_for_bit(ranks) -> None:
    assert ranks[1]["whole"] == ranks[1]["saved"]


def test_training_begins_from_weights_alone(ranks) -> None:
    results = ranks[1]
    assert results["from weights"] == results["from saved"]
    assert results["from half"] != results["from saved"]
    assert results["from half"] == pytest.approx(results["from saved"], abs=1e-2)
    assert "has no optimizer state: set checkpoint.load_weights_only" in results["refused"]


def test_every_bit_is_copied(ranks) -> None:
    folder, _ = ranks
    before, after = (whole_tensors(folder / name / "step_0000003") for name in ("saved", "whole"))
    assert before.keys() == after.keys() and any(key.startswith("optimizer.") for key in before)
    assert all(torch.equal(before[key], after[key]) for key in before)
    content = inspect(folder / "whole")
    assert content["problem"] is None and content["objects"] == inspect(folder / "saved")["objects"]
    sizes = [size for name, size in content["manifest"]["files"].items() if "distcp" in name]
    assert len(sizes) > 2 and max(sizes) <= 100_000


def test_weights_only_and_another_dtype(ranks) -> None:
    folder, _ = ranks
    before, weights, half = (
        whole_tensors(folder / name / "step_0000003") for name in ("saved", "weights", "half")
    )
    assert weights.keys() == {key for key in before if not key.startswith("optimizer.")}
    assert all(torch.equal(weights[key], before[key]) for key in weights)
    for key, tensor in half.items():
        kept = key.endswith((".A_log", ".D", ".dt_proj.bias"))
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), key
        assert torch.equal(tensor, before[key].to(tensor.dtype)), key
    objects = inspect(folder / "half")["objects"]
    assert "common_state" in objects and "rng" not in objects
    files = list((folder / "weights" / "step_0000003").glob("*.distcp"))
    assert len(files) == 1


def test_damage_is_not_copied(ranks, tmp_path: Path) -> None:
    broken = tmp_path / "step_0000003"
    shutil.copytree(ranks[0] / "saved" / "step_0000003", broken)
    file = broken / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="the contents of __1_0.distcp have changed"):
        reshard(ReshardOptions(broken, tmp_path / "out"), silent)
    assert [path.name for path in tmp_path.iterdir()] == ["step_0000003"]


def test_a_copy_that_differs_gets_no_name(ranks, tmp_path: Path, monkeypatch) -> None:
    from samba_megatron.checkpoint import reshard as module

    class Faulty(module._Files):
        def add(self, index, place, data):
            damaged = data[:-1] + bytes([data[-1] ^ 1]) if "embedding" in index.fqn else data
            super().add(index, place, damaged)

    monkeypatch.setattr(module, "_Files", Faulty)
    with pytest.raises(RuntimeError, match="differs from .* in embedding.word_embeddings.weight"):
        reshard(ReshardOptions(ranks[0] / "saved", tmp_path / "out"), silent)
    assert not (tmp_path / "out").exists()


def test_the_command(ranks, tmp_path: Path, monkeypatch, capsys) -> None:
    def run(*options: str) -> str:
        saved = str(ranks[0] / "saved")
        arguments = ["convert_checkpoint.py", "reshard", "--checkpoint", saved, *options]
        monkeypatch.setattr(sys, "argv", arguments)
        convert_checkpoint.main()
        return str(capsys.readouterr().out)

    def refusal(*options: str) -> str:
        with pytest.raises(UserError) as error:
            run(*options)
        return str(error.value)

    output, new = str(tmp_path / "weights"), str(tmp_path / "new")
    said = run("--output", output, "--weights-only", "--dtype", "bf16")
    assert "1 file of" in said and "pieces compared" in said
    assert "--checkpoint.load_weights_only true" in said
    assert "is not an empty folder" in refusal("--output", output)
    assert "add --weights-only" in refusal("--output", new, "--dtype", "fp32")
    assert "--file-size is '5 boxes'" in refusal("--output", new, "--file-size", "5 boxes")
