"""The command: a whole export with its parity check, and sentences about bad input."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from samba_megatron.checkpoint.huggingface import export as exporting
from samba_megatron.checkpoint.huggingface.export import ExportOptions, export
from samba_megatron.checkpoint.huggingface.fields import (
    beyond_fla,
    from_fields,
    hidden_ratio,
    to_fields,
)
from samba_megatron.checkpoint.huggingface.importing import import_model
from samba_megatron.config import ModelConfig
from samba_megatron.config.load import parse_run_config
from samba_megatron.config.pattern import layer_symbols
from samba_megatron.data.tokenizer import train_tokenizer
from samba_megatron.platform.errors import ExitWith, UserError
from tools import convert_checkpoint

ROOT = Path(__file__).parents[3]
RECIPES = sorted(
    path.relative_to(ROOT / "pretrain" / "recipes")
    for path in (ROOT / "pretrain" / "recipes").rglob("*.yaml")
)


def silent(text: str) -> None:
    """Says nothing."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["some text to learn from", "more text"], 270, folder, show_progress=False)
    return folder


def test_a_whole_export(checkpoints, tokenizer, tmp_path):
    output = tmp_path / "exported"
    result = subprocess.run(
        [
            *(sys.executable, "tools/convert_checkpoint.py", "to-hf", "--output", str(output)),
            *("--checkpoint", str(checkpoints["untied bf16"].parent), "--dtype", "bf16"),
            *("--shard-size", "50KB", "--tokenizer", str(tokenizer)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "parity passed: 49 tensors are equal bit by bit; fp32 logits differ" in result.stderr
    assert "memory at most" in result.stdout
    report = json.loads((output / "parity.json").read_text())
    assert report["passed"] and report["logits"]["max_abs_difference"] <= 1e-4
    assert report["logits"]["prompt_lengths"] == [17, 64, 76]
    assert report["logits"]["in_bfloat16"]["max_abs_difference"] > 1e-4
    assert not output.with_name("exported.partial").exists()
    assert (output / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    generation = json.loads((output / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (0, 1)


def test_import_command(exports, tmp_path, monkeypatch, capsys):
    command = ["from-hf", "--input", exports[0]["samba"], "--output", tmp_path / "imported"]
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, command)])
    convert_checkpoint.main()
    said = capsys.readouterr().out
    assert "M-*- x2" in said and "--checkpoint.load_weights_only true" in said
    assert (tmp_path / "imported" / "latest").read_text() == "step_0000000\n"
    with pytest.raises(UserError, match="is not an empty folder"):
        convert_checkpoint.main()


def test_inspect(checkpoints, monkeypatch, capsys):
    command = ["inspect", "--checkpoint", str(checkpoints["samba"])]
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *command])
    convert_checkpoint.main()
    said = capsys.readouterr().out
    for text in (
        *("3,584", "tensor 2, pipeline 2", "float32", "M-*- x2", "mixer.in_proj.weight"),
        *("hidden_size: 32", "window_size: 12", "data.sequence_length: 64", "params_dtype: fp32"),
    ):
        assert text in said


def test_an_export_that_is_wrong_does_not_look_finished(checkpoints, tmp_path, monkeypatch):
    class Faulty(exporting.ShardWriter):
        def write(self, name, tensor):
            super().write(
                name, tensor * 1.001 if name.endswith("3.mixer.k_proj.weight") else tensor
            )

    monkeypatch.setattr(exporting, "ShardWriter", Faulty)
    options = ExportOptions(checkpoints["samba"], tmp_path / "wrong", compare="tensors")
    with pytest.raises(ExitWith, match="not the same model") as stop:
        export(options, silent)
    assert stop.value.code == 1
    assert not (tmp_path / "wrong").exists()
    report = json.loads((tmp_path / "wrong.partial" / "parity.json").read_text())
    assert report["tensors"]["different"] == ["backbone.layers.3.mixer.k_proj.weight"]
    with pytest.raises(UserError, match=r"wrong\.partial was left by a conversion"):
        export(options, silent)


def test_overwriting_replaces_an_earlier_export_alone(checkpoints, tmp_path):
    output = tmp_path / "exported"
    first = ExportOptions(checkpoints["every layer"], output, compare="tensors")
    export(first, silent)
    output.with_name("exported.partial").mkdir()
    other = dataclasses.replace(first, checkpoint=checkpoints["ablation"], overwrite=True)
    export(other, silent)
    assert json.loads((output / "config.json").read_text())["layer_pattern"] == "M*-M*-"
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="no parity.json, so it is no earlier one"):
        export(dataclasses.replace(other, output=mine), silent)
    assert (mine / "thesis.tex").exists()


def test_from_bf16_to_fp32_and_down(checkpoints, tmp_path):
    for dtype in ("fp32", "bf16"):
        options = ExportOptions(
            checkpoints["samba"], tmp_path / dtype, dtype=dtype, compare="tensors"
        )
        report = export(options, silent)
        assert report.parity["passed"]
        fields = json.loads((tmp_path / dtype / "config.json").read_text())
        assert fields["dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[dtype]


def refusal(work) -> str:
    with pytest.raises(UserError) as error:
        work()
    return str(error.value)


def test_bad_checkpoints(checkpoints, tmp_path):
    def attempt(path: Path) -> str:
        return refusal(lambda: export(ExportOptions(path, tmp_path / "out"), silent))

    assert "there is no checkpoint" in attempt(tmp_path / "nowhere")
    assert "holds no checkpoint of Samba-Megatron" in attempt(tmp_path)
    broken = tmp_path / "step_0000007"
    shutil.copytree(checkpoints["samba"], broken)
    (broken / "__1_0.distcp").unlink()
    assert "is corrupt: __1_0.distcp is missing" in attempt(broken)
    shutil.copy(checkpoints["samba"] / "__1_0.distcp", broken)
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["config"]["model"]["hybrid_layer_pattern"] = "M-*- x3"
    (broken / "manifest.json").write_text(json.dumps(manifest))
    assert "is of an unknown architecture: it lacks decoder.layers.8." in attempt(broken)
    manifest["config"]["model"]["hybrid_layer_pattern"] = "M-G- x2"
    (broken / "manifest.json").write_text(json.dumps(manifest))
    assert "unknown symbol 'G'" in attempt(broken)
    assert not list(tmp_path.glob("out*"))


def test_bad_output_and_tokenizer(checkpoints, tokenizer, tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()

    def attempt(**fields) -> str:
        options = {"checkpoint": checkpoints["samba"], "output": tmp_path / "out", **fields}
        return refusal(lambda: export(ExportOptions(**options), silent))

    assert "is not an empty folder" in attempt(output=full)
    assert "cannot read the tokenizer" in attempt(tokenizer=full)
    larger = tmp_path / "larger"
    train_tokenizer([" ".join(f"w{i}" for i in range(400))], 400, larger, show_progress=False)
    assert "the model's vocabulary 320" in attempt(tokenizer=larger)
    other = tmp_path / "step_0000007"
    shutil.copytree(checkpoints["samba"], other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["data_identity"]["tokenizer"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    sentence = attempt(checkpoint=other, tokenizer=tokenizer)
    assert "is not the one that the model was trained with" in sentence
    assert not list(tmp_path.glob("out*"))


def test_bad_imports(exports, tmp_path):
    folder = tmp_path / "hf"
    shutil.copytree(exports[0]["samba"], folder)
    config = json.loads((folder / "config.json").read_text())

    def attempt(**fields) -> str:
        (folder / "config.json").write_text(json.dumps({**config, **fields}))
        return refusal(lambda: import_model(folder, tmp_path / "out", silent))

    assert "model_type 'jamba', an architecture" in attempt(model_type="jamba")
    assert "attn.qkv_bias" in attempt(attn={**config["attn"], "qkv_bias": True})
    assert "it lacks backbone.layers.4." in attempt(num_hidden_layers=5)
    assert "has backbone.layers.3." in attempt(num_hidden_layers=3)
    assert "rows and config.json means" in attempt(attn={**config["attn"], "num_kv_heads": 4})
    second = next(folder.glob("model-00002*"))
    second.write_bytes(second.read_bytes()[:-4])
    assert "bytes and should have" in attempt()
    second.write_bytes(b"<html>not found</html>")
    assert "is not a safetensors file" in attempt()
    second.unlink()
    assert "is missing, which model.safetensors.index.json names" in attempt()
    for file in folder.glob("model*"):
        file.unlink()
    assert "only safetensors can be read" in attempt()
    assert "it has no config.json" in refusal(
        lambda: import_model(tmp_path / "none", tmp_path / "out", silent)
    )
    assert not list(tmp_path.glob("out*"))


def test_a_model_trained_with_flash_linear_attention(exports, tmp_path):
    """Its own class writes a configuration without our auto_map, and with fields of its own."""
    folder = tmp_path / "fla"
    shutil.copytree(exports[0]["samba"], folder)
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"], config["dtype"]
    config |= {"fuse_norm": True, "intermediate_size": 64, "residual_in_fp32": False}
    (folder / "config.json").write_text(json.dumps(config))
    report = import_model(folder, tmp_path / "imported", silent)
    assert report.config.model.hybrid_layer_pattern == "M-*- x2"
    assert report.config.model.ffn_hidden_size == 256


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_sizes_of_every_recipe_come_back(recipe):
    arguments = ["--config", str(ROOT / "pretrain" / "recipes" / recipe)]
    model = parse_run_config(arguments).model
    came_back = from_fields(json.loads(json.dumps(to_fields(model, 4096, {}))))
    assert came_back.ffn_hidden_size == model.ffn_hidden_size
    assert came_back.resolved_dt_rank == model.resolved_dt_rank
    assert (came_back.head_dim, came_back.kv_heads) == (model.head_dim, model.kv_heads)
    windows = [
        [came.window_size if symbol == "*" else None for symbol in layer_symbols(pattern)]
        for came, pattern in (
            (model, model.hybrid_layer_pattern),
            (came_back, came_back.hybrid_layer_pattern),
        )
    ]
    assert windows[0] == windows[1]
    kinds = [layer_symbols(m.hybrid_layer_pattern).replace("F", "*") for m in (model, came_back)]
    assert kinds[0] == kinds[1]


def test_ratios_are_round():
    assert hidden_ratio(1536, 4096) == hidden_ratio(2304, 6144) == 4
    assert hidden_ratio(2048, 8192) == 6
    assert hidden_ratio(2816, 9984) == 5.25
    assert hidden_ratio(1536, 4000) is None
    assert beyond_fla(ModelConfig(ffn_hidden_size=4000)) == [
        "an MLP whose width is no multiple of 256"
    ]
