"""Export and import of checkpoints: nothing is lost, and the logits are the same."""

import json
from pathlib import Path

import pytest
import torch

from samba_megatron.checkpoint.huggingface import parity_sides
from samba_megatron.checkpoint.huggingface.shards import INDEX
from samba_megatron.checkpoint.huggingface.source import CheckpointSource
from tests.checkpoint.huggingface.save_models import MODELS, config_of

pytestmark = pytest.mark.usefixtures("own_modules")


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_every_bit_is_the_same(checkpoints, imported, name):
    before, after = CheckpointSource(checkpoints[name]), CheckpointSource(imported[name])
    assert set(after.entries) == {key for key in before.entries if "optimizer" not in key}
    for link in before.links:
        saved, came_back = before.read(link), after.read(link)
        assert saved.dtype == came_back.dtype, link.key
        assert torch.equal(saved.view(-1).view(torch.uint8), came_back.view(-1).view(torch.uint8))
    assert after.manifest.parameters == before.manifest.parameters


@pytest.mark.parametrize("name", MODELS)
def test_training_can_start_from_an_import(logits, name):
    for saved, came_back in zip(logits["saved"][name], logits["imported"][name], strict=True):
        assert torch.equal(saved, came_back)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_gives_the_same_logits(checkpoints, exports, logits, name, tmp_path):
    dtype = "bfloat16" if "bf16" in name else "float32"
    expected = logits["saved"][name]
    assert max(float(part.std()) for part in expected) > 0.02, "logits that show nothing"
    torch.save(expected, tmp_path / parity_sides.LOGITS)
    report = parity_sides.compare_reloaded(checkpoints[name], exports[0][name], dtype, tmp_path)
    assert report["tensors"]["different"] == []
    assert report["tensors"]["compared"] >= 24
    assert report["logits"]["max_abs_difference"] <= 1e-5
    assert ("in_bfloat16" in report["logits"]) == ("bf16" in name)


@pytest.mark.parametrize("name", MODELS)
def test_the_sizes_come_back(imported, name):
    model, before = CheckpointSource(imported[name]).config.model, config_of(name).model
    assert model == before


def test_what_flash_linear_attention_cannot_say_is_said(exports):
    folders, said = exports
    sentences = {name: " ".join(texts) for name, texts in said.items()}
    assert "cannot express this model" not in sentences["samba"]
    assert "a window and without one" in sentences["every layer"]
    for reason in ("in turn", "no position embedding", "a short convolution", "hidden_size wide"):
        assert reason in sentences["ablation"]
    kinds = {n: json.loads((p / "config.json").read_text()) for n, p in folders.items()}
    assert kinds["samba"]["model_type"] == "samba"
    assert "layer_pattern" not in kinds["samba"]
    assert kinds["ablation"]["model_type"] == "samba_hybrid"


def test_the_layout_of_the_folder(exports):
    folder: Path = exports[0]["samba"]
    config = json.loads((folder / "config.json").read_text())
    index = json.loads((folder / INDEX).read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 1 and all((folder / file).is_file() for file in files)
    assert config["attn"] == {
        "layers": [1, 3],
        "num_heads": 4,
        "num_kv_heads": 2,
        "qkv_bias": False,
        "window_size": 12,
        "rope_theta": 10000.0,
    }
    assert config["hidden_ratio"] is not None and config["tie_word_embeddings"]
    names = {n for n in index["weight_map"] if n.startswith("backbone.layers.1.")}
    assert names == {
        "backbone.layers.1." + n
        for n in (
            *("mixer_norm.weight", "mlp_norm.weight"),
            *(f"mixer.{n}_proj.weight" for n in "qkvo"),
            *(f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
        )
    }
    assert "lm_head.weight" not in index["weight_map"]
    assert {"README.md", "parity.json", "generation_config.json", "modeling_samba.py"} <= {
        path.name for path in folder.iterdir()
    }
    card = (folder / "README.md").read_text()
    assert "| training tokens | 3,584 |" in card and "# license: (yours to choose)" in card


def test_safetensors_own_reader_agrees(exports):
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(exports[0]["untied bf16"].glob("*.safetensors")):
        found |= load_file(file)
    assert found["lm_head.weight"].dtype == torch.bfloat16
    assert found["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    assert found["backbone.layers.0.mixer.in_proj.weight"].shape == (128, 32)
